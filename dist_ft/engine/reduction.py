"""Averaging of gradients over ranks for parameters of any dtype, some of which may have no gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # minimum size of a bucket; the default of DistributedDataParallel


class GradientAverage:
    """Average gradients over ranks bucket by bucket, overlapping with the backward.

    Unlike the reducer of DistributedDataParallel, it reduces gradients in their own dtype, which may differ from that
    of the parameters (`Tensor.grad_dtype`), and accepts parameters without a gradient: a rank without one sends zeros,
    and a parameter without a gradient on all ranks keeps None.

    Args:
        parameters: Trained parameters, in the same order on every rank.
        world_size: Number of ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world_size: int) -> None:
        self.world_size = world_size
        self.buckets = _split(parameters)
        self.bucket_of = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[set[int]] | None = None  # per bucket, parameters still without a gradient; None if inactive
        self.sent: list[tuple[Tensor, dist.Work]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrive)

    @contextlib.contextmanager
    def averaging(self) -> Iterator[None]:
        """Return a context for the last backward of a step, after which gradients are averaged. Collective."""
        self.missing = [{id(p) for p in bucket} for bucket in self.buckets]
        self.sent = []
        try:
            yield
            while len(self.sent) < len(self.buckets):
                self._send()
        finally:
            self.missing = None
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            _fill_gaps(bucket, flat)
        self.sent = []

    def _arrive(self, parameter: Tensor) -> None:
        """Reduce the buckets that are complete, in the same order on all ranks."""
        if self.missing is None:
            return
        self.missing[self.bucket_of[id(parameter)]].discard(id(parameter))
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        has_gradient = [p.grad is not None for p in bucket]
        parts = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in bucket]
        told = torch.tensor(has_gradient, dtype=parts[0].dtype).to(parts[0].device)
        flat = torch.cat([*(part.flatten() for part in parts), told])
        for parameter, part, has in zip(bucket, _views(bucket, flat), has_gradient, strict=True):
            if has:  # from now on the gradient is a view of the bucket, so that it is stored only once
                parameter.grad = part
        work = dist.all_reduce(flat.div_(self.world_size), async_op=True)
        assert work is not None
        self.sent.append((flat, work))


def _split(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into buckets in reverse order, which is roughly the order of the backward."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        if room <= 0:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= 4 * parameter.numel()
    return buckets


def _views(bucket: Sequence[nn.Parameter], flat: Tensor) -> list[Tensor]:
    parts = flat.split([*(p.numel() for p in bucket), len(bucket)])
    return [part.view_as(p) for part, p in zip(parts, bucket, strict=False)]


def _fill_gaps(bucket: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Set the gradients of parameters that only other ranks have used."""
    if all(p.grad is not None for p in bucket):
        return
    found = (flat[-len(bucket) :] > 0).tolist()
    for parameter, part, has in zip(bucket, _views(bucket, flat), found, strict=True):
        if has and parameter.grad is None:
            parameter.grad = part
