"""A task whose loss also balances the routers of a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocols import Task
from ..state import Batch, LossSum
from .wrapped import WrappedTask

if TYPE_CHECKING:
    from torch import nn

    from ..model.moe.routing import Routing


class RoutedTask(WrappedTask):
    """Adds the gradient of the balance loss and the z-loss to the inner task's loss.

    Args:
        inner: The task.
        routing: Records the routers' outputs.
    """

    def __init__(self, inner: Task, routing: Routing) -> None:
        super().__init__(inner)
        self.routing = routing

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the inner task's loss; its value is unchanged, its gradient has the routers' losses added."""
        return self.routing.loss(model, batch, self.inner.loss)
