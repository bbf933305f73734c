"""Norms of the rows' gradients, computed during the backward; each gradient is freed immediately afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class RowNorms:
    """Compute gradient norms in hooks, because FSDP2 gathers parameters only while their block runs.

    `squares` holds the squared norms of the last backward by parameter name, `[rows]` float64.
    """

    def __init__(self) -> None:
        self.names: dict[nn.Parameter, str] = {}
        self.squares: dict[str, Tensor] = {}
        self.fault: str | None = None  # why the hooks' norms cannot be used
        self._reached: set[str] = set()
        self._rows = 0
        self._by_hooks = False
        self._is_listening = False

    def watch(self, name: str, parameter: Any) -> None:
        """Register hooks on a gathered parameter."""
        if parameter in self.names:
            return
        self.names[parameter] = name
        parameter.register_post_accumulate_grad_hook(self._take_gradient)
        parameter.grad_sample = None  # Opacus's hooks expect these attributes
        parameter._forward_counter = 0

    @contextlib.contextmanager
    def listening(self, rows: int, *, by_hooks: bool) -> Iterator[None]:
        """Return a context for a backward whose gradients are measured and discarded.

        Args:
            rows: Number of rows of the micro-batch.
            by_hooks: Whether Opacus's hooks provide the gradients of rows; otherwise there is at most one row, and
                autograd's gradients are used.
        """
        self.squares, self._reached = {}, set()
        self._rows, self._by_hooks, self._is_listening = rows, by_hooks, True
        try:
            yield
        finally:
            self._is_listening = False
        if by_hooks:
            for name in sorted(self._reached ^ self.squares.keys()):
                self.fail(f"{name} is not used exactly once per row")

    def take_samples(self, parameter: Any) -> None:
        """Measure and clear the `grad_sample` that the hooks have set on a parameter."""
        samples, parameter.grad_sample = parameter.grad_sample, None
        name = self.names[parameter]
        is_sound = isinstance(samples, Tensor) and samples.shape == (self._rows, *parameter.shape)
        if not is_sound or name in self.squares:
            self.fail(f"{name} is not used exactly once per row")
            return
        self.squares[name] = samples.float().flatten(1).square().sum(dim=1, dtype=torch.float64)

    def fail(self, reason: str) -> None:
        """Store the reason why the hooks cannot be used; only the first one is kept."""
        self.fault = self.fault or reason

    def compare(self, squares: dict[str, Tensor], row: int, tolerance: float) -> None:
        """Compare the hooks' norms of a row with those of the last backward, which was of this row only.

        Calls `fail` if the norms of a parameter differ.

        Args:
            squares: Squared norms found by the hooks, as in `self.squares`.
            row: Index of the row in `squares`.
            tolerance: Maximum difference, relative to the norm of the parameter plus 1e-3 times the total norm.
        """
        names = sorted(squares.keys() | self.squares.keys())
        nothing = torch.zeros(1, dtype=torch.float64)
        found = torch.stack([squares[name][row].cpu() if name in squares else nothing[0] for name in names]).sqrt()
        true = torch.stack([self.squares.get(name, nothing)[0].cpu() for name in names]).sqrt()
        # Written so that NaN counts as a difference.
        missed = ~((found - true).abs() <= tolerance * (true + 1e-3 * true.square().sum().sqrt()))
        if missed.any():
            self.fail(f"the gradient of {names[int(missed.int().argmax())]} for a row differs from a separate backward")

    def _take_gradient(self, parameter: Any) -> None:
        """Measure and clear the accumulated gradient of autograd."""
        if not self._is_listening:
            return
        gradient, parameter.grad = parameter.grad, None
        name = self.names[parameter]
        self._reached.add(name)
        if not self._by_hooks and self._rows == 1:
            self.squares[name] = gradient.float().square().sum(dtype=torch.float64)[None]


def total_norms(squares: dict[str, Tensor], rows: int, device: torch.device) -> Tensor:
    """Return the gradient norms of rows over all parameters, `[rows]` float64; zero without gradients."""
    if not squares:
        return torch.zeros(rows, dtype=torch.float64, device=device)
    return torch.stack([square.to(device) for square in squares.values()]).sum(dim=0).sqrt()
