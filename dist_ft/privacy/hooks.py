"""Opacus's per-sample gradient hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def attach_hooks(model: nn.Module) -> Any:
    """Opacus's hooks, which leave `grad_sample` [rows, …] on every parameter that learns.

    Raises:
        NotImplementedError: Opacus knows that it cannot do this model.
    """
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    return GradSampleHooks(model, loss_reduction="sum")


def attach_streaming_hooks(model: nn.Module, take: Callable[[Any], None], fail: Callable[[str], None]) -> Any:
    """Opacus's hooks, which hand on each parameter as soon as its `grad_sample` [rows, …] is there.

    They never raise inside a forward or a backward: other ranks would wait for this one's collectives.

    Args:
        model: whole, before it is sharded.
        take: called in a backward with a parameter whose `grad_sample` is set; it must clear it.
        fail: called with the reason where the hooks cannot do a module.

    Raises:
        NotImplementedError: Opacus knows that it cannot do this model.
    """
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.utils.module_utils import trainable_parameters

    class StreamingHooks(GradSampleHooks):
        def capture_activations_hook(self, module: nn.Module, *given: Any) -> None:
            with guarded(module):
                super().capture_activations_hook(module, *given)

        def capture_backprops_hook(self, module: nn.Module, *given: Any, **options: Any) -> None:
            with guarded(module):
                super().capture_backprops_hook(module, *given, **options)
                for _, parameter in trainable_parameters(module):
                    if getattr(parameter, "grad_sample", None) is not None:
                        take(parameter)

    @contextlib.contextmanager
    def guarded(module: nn.Module) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a module does that the hooks do not foresee
            fail(f"{type(module).__name__}: {type(error).__name__}: {error}".splitlines()[0])

    return StreamingHooks(model, loss_reduction="sum")
