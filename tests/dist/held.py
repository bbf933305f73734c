"""What a rank holds in memory while it trains, and while a model is built: measured in worker processes.

Bytes are counted twice over: by name (gradients, optimizer), and by looking at every tensor that is alive, so that a
buffer which no one thought of is seen too. Benchmarks count with the same functions.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_ft.build import build
from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.families import ModelRecipe, build_method, choose_attention
from dist_ft.loop import Run, fit
from dist_ft.prepare import prepare
from dist_ft.process import comm
from dist_ft.process.place import Place, Worker
from dist_ft.state import CAUSAL_LM


def hold_all(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`hold` each configuration in turn."""
    return [hold(place, case) for case in cases]


def hold(place: Place, case: dict[str, Any]) -> dict[str, Any]:
    """Build and, if `case["train"]`, train as `case["config"]` says; bytes of this rank on the way."""
    config = RunConfig.model_validate(case["config"])
    plan = make_plan(config, nodes=1, workers_per_node=place.world_size, origins={})
    if place.is_main:
        write_plan(plan)
    prepared = prepare(config)
    build_method(config)  # so that peft, which is imported when it is needed, does not count
    before = living()  # held until the end, so that no new tensor comes to stand where an old one was
    trim()
    comm.barrier()
    resident = forget_peak()
    run = build(plan, prepared, Worker(place, torch.device("cpu"), sys.stderr, lambda phase: None))
    found: dict[str, Any] = {"build_peak": peak_resident() - resident}
    trim()
    found["build"] = read_status("VmRSS") - resident
    comm.barrier()
    if case.get("train"):
        forget_peak()
        found |= watch_steps(run, before)
        found["train_peak"] = peak_resident() - resident
    return found


def load_all(place: Place, configs: list[dict[str, Any]]) -> list[int]:
    """Resident bytes that the model of each configuration adds to this rank before an engine has it."""
    found = []
    for given in configs:
        config = RunConfig.model_validate(given)
        prepared = prepare(config)
        attention = choose_attention(config, prepared.model_dir, torch.device("cpu"), CAUSAL_LM)
        recipe = ModelRecipe(config, prepared.model_dir, attention, CAUSAL_LM, build_method(config))
        trim()
        resident = read_status("VmRSS")
        model = recipe.build(weights=place.is_main)
        trim()
        found.append(read_status("VmRSS") - resident)
        del model
        comm.barrier()
    return found


def watch_steps(run: Run, before: list[Tensor]) -> dict[str, Any]:
    """Train to the end; count between the last backward and its step, when moments are there and gradients still."""
    engine: Any = run.training.engine
    found: dict[str, Any] = {}
    step, left = engine.step, iter(range(run.training.total_steps - 1, -1, -1))

    def counted(rate: float) -> Any:
        if next(left) == 0:
            found["frozen_with_gradient"] = [n for n, p in engine.model.named_parameters() if holds_frozen_gradient(p)]
            found["gradients"] = storage_bytes(gradients_of(engine))
            found["beside_weights"] = bytes_beside(engine.model, before)
        return step(rate)

    engine.step = counted
    fit(run)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    weights = [(p, held_part(p)) for p in engine.model.parameters()]
    found["optimizer"] = storage_bytes(local(value) for value in states if value.numel() > 1)
    found["frozen"] = sum(part.numel() * part.element_size() for p, part in weights if not p.requires_grad)
    found["trained"] = sum(part.numel() * part.element_size() for p, part in weights if p.requires_grad)
    return found


def holds_frozen_gradient(parameter: Tensor) -> bool:
    return not parameter.requires_grad and parameter.grad is not None


def gradients_of(engine: Any) -> list[Tensor]:
    """Where gradients lie: on parameters, and in what DeepSpeed keeps of them until its step."""
    found = [p.grad for p in engine.model.parameters() if p.grad is not None]
    optimizer = engine.optimizer
    for name in ("averaged_gradients", "averaged_gradients_by_param"):  # ZeRO-1 and 2: by group
        for group in (getattr(optimizer, name, None) or {}).values():
            found += [g for g in group or [] if isinstance(g, Tensor)]
    parts = getattr(optimizer, "grad_partitions_flat_buffer", None)  # ZeRO-3
    found += [] if parts is None else [parts]
    return [local(gradient) for gradient in found]


def held_part(parameter: Any) -> Tensor:
    """What of a parameter this rank has, under any engine."""
    part = getattr(parameter, "ds_tensor", None)
    return local(parameter.data) if part is None else part


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def living() -> list[Tensor]:
    """Every tensor that Python knows of."""
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not isinstance(t, DTensor)]


def bytes_beside(model: Any, before: Iterable[Tensor]) -> int:
    """Bytes of living tensors that are no weights or buffers of `model` and were not there `before`."""
    parameters = list(model.parameters())
    weights = [*parameters, *(held_part(p) for p in parameters), *model.buffers()]
    gradients = [p.grad for p in parameters if p.grad is not None]  # autograd's own: Python has not seen them yet
    known = {key for tensor in (*before, *weights) for key in storage_of(tensor)}
    alive = [*living(), *(local(gradient) for gradient in gradients)]
    sizes = {key: size for tensor in alive for key, size in storage_of(tensor).items()}
    return sum(size for key, size in sizes.items() if key not in known)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({key: size for tensor in tensors for key, size in storage_of(tensor).items()}.values())


def storage_of(tensor: Tensor) -> dict[int, int]:
    """Address and bytes of what a tensor lies in; none where it holds nothing."""
    tensor = local(tensor)
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return {}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}


def read_status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> int:
    """Let the peak begin anew at what is resident now, and give that."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def peak_resident() -> int:
    """The most that was resident since `forget_peak`."""
    return read_status("VmHWM")


def trim() -> None:
    """Give freed memory back, which the allocator keeps for later otherwise."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
