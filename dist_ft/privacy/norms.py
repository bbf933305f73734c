"""Norms of rows' gradients, taken while a backward runs; each gradient is let go as soon as it has been counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class RowNorms:
    """Listens to the parameters that a backward reaches, which under FSDP2 are whole only then.

    `squares` are of the last backward: by parameter name [rows] float64, the squared norms of the gradients of rows.
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
        """Listen to a parameter as autograd sees it, from now on."""
        if parameter in self.names:
            return
        self.names[parameter] = name
        parameter.register_post_accumulate_grad_hook(self._take_gradient)
        parameter.grad_sample = None  # what Opacus's hooks expect to find
        parameter._forward_counter = 0

    @contextlib.contextmanager
    def listening(self, rows: int, *, by_hooks: bool) -> Iterator[None]:
        """Around a backward, of which no gradient is left.

        Args:
            rows: of the micro-batch.
            by_hooks: whether hooks hand in gradients of rows; else autograd's own are those of the only row, if any.
        """
        self.squares, self._reached = {}, set()
        self._rows, self._by_hooks, self._is_listening = rows, by_hooks, True
        try:
            yield
        finally:
            self._is_listening = False
        if by_hooks:
            for name in sorted(self._reached ^ self.squares.keys()):
                self.fail(f"{name} is not used once a row")

    def take_samples(self, parameter: Any) -> None:
        """Count the gradients of rows that hooks have left on a parameter."""
        samples, parameter.grad_sample = parameter.grad_sample, None
        name = self.names[parameter]
        is_sound = isinstance(samples, Tensor) and samples.shape == (self._rows, *parameter.shape)
        if not is_sound or name in self.squares:
            self.fail(f"{name} is not used once a row")
            return
        self.squares[name] = samples.float().flatten(1).square().sum(dim=1, dtype=torch.float64)

    def fail(self, reason: str) -> None:
        """Remember why hooks cannot be used; the first reason tells most."""
        self.fault = self.fault or reason

    def compare(self, squares: dict[str, Tensor], row: int, tolerance: float) -> None:
        """Fail if what hooks found is not so, where the last backward was of `row` alone, parameter by parameter.

        Args:
            squares: of the hooks.
            row: which of theirs.
            tolerance: of a parameter's norm, in parts of itself (and a thousandth of that of all).
        """
        names = sorted(squares.keys() | self.squares.keys())
        nothing = torch.zeros(1, dtype=torch.float64)
        found = torch.stack([squares[name][row].cpu() if name in squares else nothing[0] for name in names]).sqrt()
        true = torch.stack([self.squares.get(name, nothing)[0].cpu() for name in names]).sqrt()
        # Not a number is a miss too.
        missed = ~((found - true).abs() <= tolerance * (true + 1e-3 * true.square().sum().sqrt()))
        if missed.any():
            self.fail(f"{names[int(missed.int().argmax())]}'s gradient of a row is not what its own backward gives")

    def _take_gradient(self, parameter: Any) -> None:
        """Autograd's own gradient, when all of it is there."""
        if not self._is_listening:
            return
        gradient, parameter.grad = parameter.grad, None
        name = self.names[parameter]
        self._reached.add(name)
        if not self._by_hooks and self._rows == 1:
            self.squares[name] = gradient.float().square().sum(dtype=torch.float64)[None]


def total_norms(squares: dict[str, Tensor], rows: int, device: torch.device) -> Tensor:
    """[rows] float64: norms over all parameters, zero where no gradient was."""
    if not squares:
        return torch.zeros(rows, dtype=torch.float64, device=device)
    return torch.stack([square.to(device) for square in squares.values()]).sum(dim=0).sqrt()
