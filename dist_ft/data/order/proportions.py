"""How often a run sees each set of its mixture, and each set's share of samples and supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...config.run import RunConfig
from ..store.opened import Split
from .interleave import Interleaving, share_out
from .order import total_steps


@dataclass(frozen=True)
class Proportion:
    """Of one set."""

    name: str
    samples: int  # that the set has
    seen: int  # samples that the run sees
    share: float  # of all samples that the run sees
    token_share: float  # of all supervised tokens; those of what is seen in part are estimated by the set's mean

    @property
    def times(self) -> float:
        """How often each of its samples is seen, in the mean."""
        return self.seen / self.samples


def proportions(config: RunConfig, train: Split) -> list[Proportion]:
    """Of each set over the whole run; nothing of a run without a mixture."""
    if not train.parts:
        return []
    sizes = train.sizes
    length = config.train
    _, total = total_steps(sum(sizes.values()), length.global_batch_size, length.max_steps, length.num_train_epochs)
    seen = Interleaving(quotas_of(config, sizes)).counts(total).tolist()
    tokens = [
        count * part.ledger["supervised_tokens"] / part.ledger["samples"]
        for count, part in zip(seen, train.parts.values(), strict=True)
    ]
    return [
        Proportion(name, sizes[name], count, count / total, own / sum(tokens))
        for name, count, own in zip(sizes, seen, tokens, strict=True)
    ]


def describe_mixture(config: RunConfig, train: Split) -> Iterator[str]:
    """A line a set."""
    for found in proportions(config, train):
        yield (
            f"{found.name}: {found.share:.1%} of the samples, {found.token_share:.1%} of the supervised tokens; "
            f"its {found.samples:,} samples are seen {found.times:.2f} times"
        )


def quotas_of(config: RunConfig, sizes: Mapping[str, int]) -> list[int]:
    """What each set gets of every period's samples, see `share_out`; `sizes` are their samples by name."""
    mixture = config.data.mixture or {}
    weights = [mixture[name].weight for name in sizes]
    given = [weight for weight in weights if weight is not None]
    return share_out(list(sizes.values()), given or None, config.data.mixture_temperature)
