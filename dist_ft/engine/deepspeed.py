"""DeepSpeed ZeRO 1-3 (Rajbhandari et al. 2020). Its JSON is derived from the configuration, never written by a user."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
import deepspeed  # noqa: E402  # logs while it is imported
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)

from ..config.engine import Zero3Config, Zero12Config  # noqa: E402
from ..process.place import Place  # noqa: E402
from ..protocols import LossFn, OptimFactory  # noqa: E402
from ..state import Batch, BuiltModel, LossSum, NamedState, StepStats  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 100_000_000  # of gradients that are sent at once, at most


class Zero:
    """An engine over `deepspeed.initialize`.

    Args:
        config: stage and offloading.
        device: where this rank computes.
        place: this rank.
        dtype: forward and backward; the optimizer's copy of the trained weights is float32.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
        micro_batch_size: rows of a micro-batch (DeepSpeed wants to know).
        accumulation_steps: micro-batches of a step on a rank.
    """

    def __init__(
        self,
        config: Zero12Config | Zero3Config,
        *,
        device: torch.device,
        place: Place,
        dtype: torch.dtype,
        max_grad_norm: float,
        micro_batch_size: int,
        accumulation_steps: int,
    ) -> None:
        self.config = config
        self.device = device
        self.place = place
        self.dtype = dtype
        self.stage = int(config.name[-1])
        self.derive_json = functools.partial(
            derive_json, config, dtype, max_grad_norm, micro_batch_size, accumulation_steps
        )

    def setup(self, built: BuiltModel, build_optim: OptimFactory) -> None:
        """Distribute the model; DeepSpeed sends rank 0's weights to the others while it partitions."""
        model, anatomy = built
        # On CPUs DeepSpeed would compile an all-reduce that only inference calls, behind a lock file that a killed
        # worker leaves lying: the next run then waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        for parameter in model.parameters():  # not buffers: position frequencies keep their precision
            parameter.data = parameter.data.to(self.dtype)
        # Ranks use different experts: ZeRO-3 must gather all of a mixture at once, or one rank waits for ever for a
        # gather that another never starts.
        for mixture in anatomy.mixtures if self.stage == 3 else ():
            set_z3_leaf_module(anatomy.part(mixture.name), True)
        # Before parameters are taken apart, because weight decay goes by their dimensions.
        optimizer = build_optim((name, p) for name, p in model.named_parameters() if p.requires_grad)
        settings = self.derive_json(sum(p.numel() for p in model.parameters() if p.requires_grad))
        if self.stage == 3:  # one tensor after another; `initialize` alone would send every rank the whole model first
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            for buffer in model.buffers():  # which `initialize` now leaves to us
                buffer.data = buffer.data.to(self.device)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model: nn.Module = self.engine.module
        self.engine.train()
        self.mesh = init_device_mesh(self.device.type, (self.place.world_size,))
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.updates = 0
        self._make_moments()

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Add the gradient of `loss / denominator`; ZeRO averages over ranks, hence times world size."""
        self._set_training(True)
        self.engine.set_gradient_accumulation_boundary(last)
        result = loss(self.engine, micro.to(self.device))
        self.engine.backward(result.loss * (self.place.world_size / denominator), scale_wrt_gas=False)
        return LossSum(result.loss.detach(), result.weight, result.counts)

    def step(self, learning_rate: float) -> StepStats:
        """Clip, update, clear."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self.engine.step()
        self.updates += 1
        return StepStats(grad_norm=float(self.engine.get_global_grad_norm()))

    @torch.no_grad()
    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum:
        """The loss without dropout and without gradients."""
        self._set_training(False)
        return loss(self.engine, micro.to(self.device))

    def state(self) -> NamedState:
        """Trained weights and moments as shards by name: gathered one at a time, of which each rank keeps a slice."""
        tensors: dict[str, Any] = {}
        for name, parameter in self.trained:
            tensors[f"model/{name}"] = self._slice(safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self._slice(safe_get_full_optimizer_state(parameter, moment))
        return NamedState(tensors, updates=self.updates)

    def load(self, state: NamedState) -> None:
        """Take over a state whose slices a checkpoint has filled."""
        for name, parameter in self.trained:
            weights = _full(state.tensors[f"model/{name}"])
            self._set_master(parameter, weights, None)
            for moment in MOMENTS:
                self._set_master(parameter, _full(state.tensors[f"{moment}/{name}"]), moment)
            self._set_compute_copy(parameter, weights)
        for moments in self.optimizer.optimizer.state.values():
            moments["step"].fill_(float(state.updates))
        self.updates = state.updates

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        """Full tensors by name, one at a time; with `trainable`, only those that learn. Every rank must iterate."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif not trainable:
                with self._gathered(parameter):
                    yield name, parameter.data

    def _slice(self, full: Tensor) -> DTensor:
        """This rank's part of a tensor that every rank has."""
        placement = Shard(0) if full.ndim else Replicate()
        return distribute_tensor(full.detach().to(self.device), self.mesh, [placement], src_data_rank=None)

    def _make_moments(self) -> None:
        """Give AdamW the zero moments that it would make in its first step.

        ZeRO-1 and 2 link their views of the moments once, before AdamW's first step, and find nothing without this.
        """
        for flat in self._masters():
            self.optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """The flat float32 partitions that AdamW updates."""
        masters: list[Tensor] = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        return masters

    def _set_master(self, parameter: nn.Parameter, full: Tensor, moment: str | None) -> None:
        """Write this rank's part of the optimizer's copy; `moment` None means the weights."""
        if self.stage < 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, full)
            else:
                safe_set_full_optimizer_state(parameter, full, moment)
            return
        # The full-tensor setters of stage 3 overrun where the world size does not divide the parameter.
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(full.flatten(), (0, part * self.place.world_size - full.numel()))
        own = padded.narrow(0, part * self.place.rank, part)
        if moment is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, moment)

    def _set_compute_copy(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Bring the weights that forward uses in line with the optimizer's."""
        with self._gathered(parameter, modifier_rank=0):
            parameter.data.copy_(full)

    def _gathered(self, parameter: nn.Parameter, **options: Any) -> contextlib.AbstractContextManager[Any]:
        """Within, the parameter is whole; only ZeRO-3 ever takes it apart."""
        if self.stage < 3:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], **options)
        return context

    def _set_training(self, mode: bool) -> None:
        if self.engine.training != mode:
            self.engine.train(mode)


def derive_json(
    config: Zero12Config | Zero3Config,
    dtype: torch.dtype,
    max_grad_norm: float,
    micro_batch_size: int,
    accumulation_steps: int,
    trained: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration (deepspeed.ai/docs/config-json) for this run, in which `trained` elements learn."""
    # It is allocated whole, also for a small adapter; DeepSpeed wants an even number.
    bucket = min(BUCKET_ELEMENTS, trained + trained % 2)
    zero: dict[str, Any] = {
        "stage": int(config.name[-1]),
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.offload in ("optimizer", "params"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "params":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too and needs no compiler
        "steps_per_print": 10**9,
    }


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
