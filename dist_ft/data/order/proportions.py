"""Statistics of a mixture: passes over each dataset and its share of samples and supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...config.run import RunConfig
from ..store.opened import Split
from .interleave import Interleaving, share_out
from .order import total_steps


@dataclass(frozen=True)
class Proportion:
    """Statistics of one dataset of a mixture over the whole run."""

    name: str
    samples: int  # number of samples in the dataset
    seen: int  # number of its samples that the run processes, with repetitions
    share: float  # fraction of all samples that the run processes
    token_share: float  # fraction of all supervised tokens, estimated with the dataset's mean per sample

    @property
    def times(self) -> float:
        """Average number of passes over the dataset."""
        return self.seen / self.samples


def proportions(config: RunConfig, train: Split) -> list[Proportion]:
    """Return the statistics of each dataset of a mixture; an empty list for a run without a mixture."""
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
    """Yield one line of text for each dataset of the mixture."""
    for found in proportions(config, train):
        yield (
            f"{found.name}: {found.share:.1%} of the samples, {found.token_share:.1%} of the supervised tokens; "
            f"each of its {found.samples:,} samples is seen {found.times:.2f} times on average"
        )


def quotas_of(config: RunConfig, sizes: Mapping[str, int]) -> list[int]:
    """Return the samples of each dataset per period (see `share_out`), given their number of samples by name."""
    mixture = config.data.mixture or {}
    weights = [mixture[name].weight for name in sizes]
    given = [weight for weight in weights if weight is not None]
    return share_out(list(sizes.values()), given or None, config.data.mixture_temperature)
