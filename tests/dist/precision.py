"""What engines make of the same bfloat16 model and micro-batches: gradients, dtypes and memory, held by an engine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from dist_ft.config.engine import FsdpConfig, Zero3Config, Zero12Config
from dist_ft.config.optim import OptimConfig
from dist_ft.engine.ddp import Ddp
from dist_ft.engine.fsdp import Fsdp
from dist_ft.model.anatomy import find_anatomy
from dist_ft.optim.adamw import build_adamw
from dist_ft.process.place import Place
from dist_ft.state import Anatomy, Batch, BuiltModel, LossSum
from dist_ft.testing import tiny

CPU = torch.device("cpu")
TOKENS, VOCABULARY = 12, 64


def make_engine(kind: str, place: Place, dtype: torch.dtype, accumulation: int, **keys: Any) -> Any:
    """An engine by its name in the configuration; `keys` are of its group."""
    options: dict[str, Any] = {"device": CPU, "place": place, "dtype": dtype, "max_grad_norm": 1.0}
    if kind == "ddp":
        return Ddp(**options)
    if kind == "fsdp":
        return Fsdp(FsdpConfig(name="fsdp", **keys), **options)
    from dist_ft.engine.deepspeed import Zero

    config = {"zero3": Zero3Config}.get(kind, Zero12Config)(name=kind, **keys)  # type: ignore[arg-type]
    return Zero(config, micro_batch_size=1, accumulation_steps=accumulation, **options)


def make_model(architecture: str = "llama") -> nn.Module:
    """A model of bfloat16 weights, all of which learn: their float32 masters hold the same values."""
    model: nn.Module = tiny.build(architecture, vocab_size=VOCABULARY)
    return model.bfloat16().float()


def set_up(engine: Any, model: nn.Module) -> Any:
    """The engine with the model, and AdamW as runs have it."""
    config = OptimConfig(learning_rate=1e-3, weight_decay=0.1)
    engine.setup(BuiltModel(model, find_anatomy(model)), lambda named: build_adamw(config, named, fused=True))
    return engine


def batch_of(step: int, rank: int, index: int) -> Batch:
    dice = torch.Generator().manual_seed(1000 * step + 100 * rank + index)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=dice)
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch({"input_ids": ids}, ids[0, 1:], empty, empty, TOKENS)


def loss(model: nn.Module, batch: Batch) -> LossSum:
    logits = model(input_ids=batch.inputs["input_ids"], use_cache=False).logits[0, :-1]
    total = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return LossSum(total, torch.tensor(float(len(batch.targets))))


def feed(engine: Any, place: Place, step: int, accumulation: int) -> None:
    """The micro-batches of a step."""
    denominator = torch.tensor(float((TOKENS - 1) * accumulation * place.world_size))
    for index in range(accumulation):
        micro = batch_of(step, place.rank, index)
        engine.forward_backward(micro, loss, denominator, last=index == accumulation - 1)


def gradients_of(engine: Any) -> dict[str, Tensor]:
    """Whole gradients by name, as the optimizer is about to get them. Collective."""
    if not hasattr(engine, "masters"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).clone() for name, p in engine.trained}
    found = {}
    for name, parameter in engine.trained:
        gradient: Any = parameter.grad
        found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def plain_gradients(model: nn.Module, world: int, accumulation: int, step: int = 0) -> dict[str, Tensor]:
    """The float32 sum of the gradients of all micro-batches, each by a backward of its own in bfloat16."""
    half = copy.deepcopy(model).bfloat16().train()
    names, parameters = zip(*half.named_parameters(), strict=True)
    sums = [torch.zeros(p.shape) for p in parameters]
    denominator = (TOKENS - 1) * accumulation * world
    for rank in range(world):
        for index in range(accumulation):
            result = loss(half, batch_of(step, rank, index))
            parts = torch.autograd.grad(result.loss * (world / denominator), parameters)
            for total, part in zip(sums, parts, strict=True):
                total.add_(part.float(), alpha=1 / world)
    return dict(zip(names, sums, strict=True))


def compare_gradients(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case: the relative error of all gradients together against the plain sum, and their dtypes."""
    found = []
    for case in cases:
        accumulation = case["accumulation"]
        model = make_model(case.get("architecture", "llama"))
        expected = plain_gradients(model, place.world_size, accumulation)
        engine = set_up(make_engine(case["engine"], place, torch.bfloat16, accumulation, **case["keys"]), model)
        feed(engine, place, 0, accumulation)
        got = gradients_of(engine)
        assert got.keys() == expected.keys()
        miss = torch.stack([(got[n].double() - g.double()).square().sum() for n, g in expected.items()]).sum().sqrt()
        size = torch.stack([g.double().square().sum() for g in expected.values()]).sum().sqrt()
        dtypes = sorted({str(g.dtype) for g in got.values()})
        found.append(
            {"error": float(miss / size), "dtypes": dtypes, "norm": float(size), "told": engine.step(0.0).grad_norm}
        )
    return found


def train_plainly(model: nn.Module, world: int, accumulation: int, steps: int) -> dict[str, Tensor]:
    """Float32 weights after some steps, whose gradients are those of a copy in bfloat16."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for step in range(steps):
        gradients = plain_gradients(model, world, accumulation, step)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def compare_weights(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case after some steps: how far weights are from those of the plain loop, and what the forward held."""
    found = []
    for case in cases:
        expected = train_plainly(make_model(case["architecture"]), place.world_size, 2, case["steps"])
        model = make_model(case["architecture"])
        anatomy, half = find_anatomy(model), copy.deepcopy(model).bfloat16()
        engine = set_up(make_engine(case["engine"], place, torch.bfloat16, 2), model)
        for step in range(case["steps"]):
            feed(engine, place, step, 2)
            engine.step(1e-3)
        got = {name: tensor.clone() for name, tensor in engine.weights(trainable=True)}
        assert got.keys() == expected.keys()
        miss = max(float((got[n] - w).abs().max()) for n, w in expected.items())
        flow, kept = watch_forward(getattr(engine, "module", model), anatomy)
        found.append({"miss": miss, "dtypes": sorted({str(t.dtype) for t in got.values()}), "flow": flow, "kept": kept})
        found[-1]["kept_plainly"] = watch_forward(half, find_anatomy(half))[1]
    return found


def watch_forward(module: nn.Module, anatomy: Anatomy) -> tuple[list[str], int]:
    """Dtypes of what goes through blocks and experts, and the bytes that a forward keeps for its backward."""
    dtypes: set[str] = set()
    kept: dict[int, int] = {}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        dtypes.update(str(t.dtype) for t in (inputs[0], output[0] if isinstance(output, tuple) else output))

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor._base is None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    watched = [*anatomy.parts(anatomy.blocks), *(part for m in anatomy.mixtures for part in anatomy.parts(m.experts))]
    handles = [module.register_forward_hook(watch) for module in watched]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(module, batch_of(0, 0, 0))
    for handle in handles:
        handle.remove()
    result.loss.backward()
    return sorted(dtypes), sum(kept.values())


def watch_states(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case, after a step: what its state takes beside what the optimizer holds, and what its tensors are."""
    found = []
    for case in cases:
        engine = set_up(
            make_engine(case["engine"], place, getattr(torch, case["dtype"]), 1, **case["keys"]), make_model()
        )
        feed(engine, place, 0, 1)
        engine.step(1e-3)
        with CommDebugMode() as traffic:
            state = engine.state()
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        held = {storage_of(flat) for flat in inner.state} | {
            storage_of(value) for moments in inner.state.values() for value in moments.values()
        }
        parts = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in state.tensors.items()}
        before = {name: part.clone() for name, part in parts.items()}
        engine.load(state)
        found.append(
            {
                "collectives": traffic.get_total_counts(),
                "copies": [name for name, part in parts.items() if storage_of(part) not in held],
                "dtypes": sorted({str(t.dtype) for t in state.tensors.values()}),
                "shapes": {name: list(t.shape) for name, t in state.tensors.items()},
                "changed": [name for name, part in parts.items() if not torch.equal(part, before[name])],
            }
        )
    return found


def storage_of(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
