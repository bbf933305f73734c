"""What FSDP2 communicates in a step and an evaluation, and what it then holds, counted in worker processes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from dist_ft.inspect.memory import estimate_memory
from dist_ft.inspect.model import measure_sizes
from dist_ft.model.anatomy import find_anatomy
from dist_ft.process.place import Place
from dist_ft.state import BuiltModel
from tests.dist.precision import batch_of, feed, loss, make_engine, make_model, set_up

MICRO_BATCHES = 4  # of a step
IS_RENAMED = hasattr(dist, "all_gather_single")  # torch 2.13
GATHER = "all_gather_single" if IS_RENAMED else "all_gather_into_tensor"
REDUCE = "reduce_scatter_single" if IS_RENAMED else "reduce_scatter_tensor"


class Counter:
    """The sizes in bytes of what is gathered and of what is reduced, in order."""

    def __init__(self) -> None:
        self.gathered: list[int] = []
        self.reduced: list[int] = []

    def __enter__(self) -> Counter:
        gather, reduce = getattr(dist, GATHER), getattr(dist, REDUCE)

        def all_gather(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.gathered.append(output_tensor.nbytes)
            return gather(output_tensor, *args, **kwargs)

        def reduce_scatter(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            self.reduced.append(input.nbytes)
            return reduce(output, input, *args, **kwargs)

        self.patches = [
            mock.patch.object(dist, GATHER, all_gather),
            mock.patch.object(dist, REDUCE, reduce_scatter),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for patch in self.patches:
            patch.stop()


def count_all(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case: the traffic of a step and of two evaluations, and the memory that `plan` estimates."""
    found = []
    for case in cases:
        dtype = getattr(torch, case["dtype"])
        engine, model = make_engine("fsdp", place, dtype, MICRO_BATCHES, **case["keys"]), make_model()
        sizes = measure_sizes(BuiltModel(model, find_anatomy(model)), dtype)
        parts = estimate_memory(engine.config, place.world_size, sizes)
        set_up(engine, model)
        with Counter() as first:
            feed(engine, place, 0, MICRO_BATCHES)
        engine.step(1e-3)
        with Counter() as evaluation:
            losses = [float(engine.evaluate(batch_of(1, 0, 0), loss).loss) for _ in range(2)]
        found.append(
            {
                "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
                "gathered": first.gathered,
                "reduced": first.reduced,
                "evaluation": len(evaluation.gathered),
                "parts": {part.name: part.device for part in parts},
                "same": losses[0] == losses[1],
            }
        )
    return found


def load_after_evaluation(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case: the loss of a state, before another one was trained and after it was loaded again."""
    found = []
    for case in cases:
        engine = set_up(
            make_engine(case["engine"], place, getattr(torch, case["dtype"]), 1, **case["keys"]), make_model()
        )
        probe = batch_of(5, 0, 0)
        before = float(engine.evaluate(probe, loss).loss)
        kept = {name: local(tensor).clone() for name, tensor in engine.state().tensors.items()}
        weights = {name: tensor.clone() for name, tensor in engine.weights(trainable=False)}
        for step in range(3):
            feed(engine, place, step, 1)
            engine.step(1e-2)
        between = float(engine.evaluate(probe, loss).loss)
        state = engine.state()
        for name, tensor in state.tensors.items():
            local(tensor).copy_(kept[name])
        state.updates = 0
        engine.load(state)
        after = float(engine.evaluate(probe, loss).loss)
        again = {name: tensor.clone() for name, tensor in engine.weights(trainable=False)}
        same = all(torch.equal(again[name], weight) for name, weight in weights.items())
        dtypes = sorted({str(weight.dtype) for weight in again.values()})
        found.append({"before": before, "between": between, "after": after, "same": same, "dtypes": dtypes})
    return found


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]
