"""DeepSpeed ZeRO 1-3 (Rajbhandari et al. 2020). Its JSON configuration is derived from the run's configuration."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its autotuner, which no run uses, imports MLflow where it is installed: a second of processor time on each rank.
if hides_mlflow := "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # "not found", see the import system
import deepspeed  # noqa: E402  # logs while it is imported

if hides_mlflow:
    del sys.modules["mlflow"]
from deepspeed.accelerator import cuda_accelerator  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_module  # noqa: E402

from ..config.engine import Zero3Config, Zero12Config  # noqa: E402
from ..process.place import Place  # noqa: E402
from ..protocols import LossFn, OptimFactory  # noqa: E402
from ..state import Batch, Beat, BuiltModel, LossSum, NamedState, StepStats, unwatched  # noqa: E402
from .flat_shard import FlatShard  # noqa: E402
from .native import zero_moments  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 100_000_000  # maximum number of gradient elements that are reduced at once


class Zero:
    """Engine over `deepspeed.initialize`.

    Args:
        config: Stage and offloading.
        device: Device of this rank.
        place: Place of this rank.
        dtype: Dtype of forward and backward; the optimizer's copy of the trained weights is float32.
        max_grad_norm: Maximum global gradient norm; 0 disables clipping.
        micro_batch_size: Rows per micro-batch; DeepSpeed requires it.
        accumulation_steps: Micro-batches per step on each rank.
        tick: Called for each tensor that is gathered.
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
        tick: Beat = unwatched,
    ) -> None:
        self.config = config
        self.tick = tick
        self.device = device
        self.place = place
        self.dtype = dtype
        self.stage = int(config.name[-1])
        self.derive_json = functools.partial(
            derive_json, config, dtype, max_grad_norm, micro_batch_size, accumulation_steps
        )

    def setup(self, built: BuiltModel, build_optim: OptimFactory) -> None:
        """Distribute the model; DeepSpeed broadcasts rank 0's weights while it partitions them."""
        model, anatomy = built
        # On CPUs, DeepSpeed would compile an all-reduce that only inference uses, guarded by a lock file. If a worker
        # is killed, the lock file remains and the next run waits forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        ignore_nvml()
        for parameter in model.parameters():  # not buffers: rotary frequencies keep their precision
            parameter.data = parameter.data.to(self.dtype)
        # Ranks use different experts, so ZeRO-3 must gather a mixture as a whole; otherwise a rank would wait forever
        # for a gather that another rank never starts.
        for mixture in anatomy.mixtures if self.stage == 3 else ():
            if not mixture.fused:
                set_z3_leaf_module(anatomy.part(mixture.name), True)
        # Built before parameters are partitioned, because weight decay depends on their number of dimensions.
        optimizer = build_optim((name, p) for name, p in model.named_parameters() if p.requires_grad)
        settings = self.derive_json(sum(p.numel() for p in model.parameters() if p.requires_grad))
        if self.stage == 3:  # partitions tensor by tensor; `initialize` alone would first broadcast the whole model
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            for buffer in model.buffers():  # after `zero.Init`, `initialize` no longer moves them
                buffer.data = buffer.data.to(self.device)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model: nn.Module = self.engine.module
        self.engine.train()
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.updates = 0
        self._make_moments()

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Accumulate the gradient of `loss / denominator`, times the world size because ZeRO averages over ranks."""
        self._set_training(True)
        self.engine.set_gradient_accumulation_boundary(last)
        result = loss(self.engine, micro.to(self.device))
        self.engine.backward(result.loss * (self.place.world_size / denominator), scale_wrt_gas=False)
        return LossSum(result.loss.detach(), result.weight, result.counts)

    def step(self, learning_rate: float) -> StepStats:
        """Clip the gradients, update the weights unless the norm is not finite, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self.engine.step()
        self.updates += not self.optimizer.overflow  # ZeRO skips an update whose gradients are not finite, in any dtype
        return StepStats(grad_norm=float(self.engine.get_global_grad_norm()))

    @torch.no_grad()
    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum:
        """Compute the loss of a micro-batch in evaluation mode, without gradients."""
        self._set_training(False)
        return loss(self.engine, micro.to(self.device))

    def state(self) -> NamedState:
        """Return masters and moments by name, as views of this rank's partitions that loading fills in place."""
        tensors: dict[str, Any] = {}
        for name, parameter in self.trained:
            for kind, moment in (("model", None), *((moment, moment) for moment in MOMENTS)):
                tensors[f"{kind}/{name}"] = self._shard(parameter, moment)
        return NamedState(tensors, updates=self.updates)

    @torch.no_grad()
    def load(self, state: NamedState) -> None:
        """Apply a state that was returned by `state()` and filled from a checkpoint."""
        for moments in self.optimizer.optimizer.state.values():
            moments["step"].fill_(float(state.updates))
        self.updates = state.updates
        self._renew_copies()

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors by name, one at a time; with `trainable`, only trained ones. Every rank must iterate."""
        for name, parameter in self.model.named_parameters():
            self.tick(f"gathering {name}")
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif not trainable:
                with self._gathered(parameter):
                    yield name, parameter.data

    def _make_moments(self) -> None:
        """Create the zero moments that AdamW would create in its first step.

        ZeRO-1 and 2 link their views of the moments before AdamW's first step, so the moments must exist by then.
        """
        for flat in self._masters():
            self.optimizer.optimizer.state[flat] = zero_moments(flat, self.optimizer.optimizer)
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """Return the flat float32 partitions that AdamW updates."""
        if self.stage == 3:  # ZeRO-3 passes them to AdamW one at a time
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self.optimizer.optimizer.param_groups for flat in group["params"]]

    def _shard(self, parameter: nn.Parameter, moment: str | None) -> FlatShard:
        """Return this rank's shard of a moment, or of the optimizer's float32 copy of the parameter if it is None."""
        if self.stage == 3:
            own, _ = self.optimizer._get_fp32_opt_state_partition(parameter, True, moment)
            shape, part = parameter.ds_shape, len(own)  # type: ignore[attr-defined]
            start = min(part * self.place.rank, shape.numel())
            own = own[: min(part, shape.numel() - start)]  # without padding
        elif (mapping := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
            shape, start, own = parameter.shape, 0, self._masters()[0][:0]
        else:
            shape, start, own = parameter.shape, mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)
        return FlatShard(own.detach(), shape, start)

    def _renew_copies(self) -> None:
        """Copy the masters into the weights that the forward uses, shard by shard. Collective."""
        optimizer = self.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        kept = optimizer.persistent_parameters  # small parameters that stay gathered
        if kept:
            kept[0].partition(kept)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept:
            kept[0].all_gather(kept)

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the parameter is gathered; only ZeRO-3 partitions parameters."""
        if self.stage < 3:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
        return context

    def _set_training(self, mode: bool) -> None:
        if self.model.training != mode:  # `train` of DeepSpeed's engine does not set its own `training`
            self.engine.train(mode)


def ignore_nvml() -> None:
    """Make DeepSpeed query free memory through torch instead of NVML.

    If nvidia-ml-py is installed, DeepSpeed passes the entry of CUDA_VISIBLE_DEVICES to NVML as an index. The entry may
    be a UUID, or an index that is only valid inside the job.
    """
    cuda_accelerator.pynvml = None


def derive_json(
    config: Zero12Config | Zero3Config,
    dtype: torch.dtype,
    max_grad_norm: float,
    micro_batch_size: int,
    accumulation_steps: int,
    trained: int,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration (deepspeed.ai/docs/config-json) for a run with `trained` trainable elements."""
    # A bucket is allocated in full even for a small adapter, and DeepSpeed requires an even size.
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
        # float32 as under the other engines; the default of both is the dtype of the model. ZeRO-2 still divides by
        # the number of ranks in the dtype of the model, which is exact for powers of two.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the CPU and needs no compiler
        "steps_per_print": 10**9,
    }
