"""Opacus's per-sample gradient hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def attach_hooks(model: nn.Module) -> Any:
    """Attach Opacus's hooks, which set `grad_sample` `[rows, ...]` on every trained parameter.

    Raises:
        NotImplementedError: Opacus does not support this model.
    """
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    return GradSampleHooks(model, loss_reduction="sum")


def attach_streaming_hooks(model: nn.Module, take: Callable[[Any], None], fail: Callable[[str], None]) -> Any:
    """Attach Opacus's hooks and pass on each parameter as soon as its `grad_sample` `[rows, ...]` is set.

    The hooks never raise inside a forward or backward, because other ranks would wait for this rank's collectives.

    Args:
        model: The model before it is sharded.
        take: Called during the backward with a parameter whose `grad_sample` is set; must clear it.
        fail: Called with the reason if the hooks fail for a module.

    Raises:
        NotImplementedError: Opacus does not support this model.
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
        except Exception as error:  # the hooks may fail in any way
            fail(f"{type(module).__name__}: {type(error).__name__}: {error}".splitlines()[0])

    return StreamingHooks(model, loss_reduction="sum")
