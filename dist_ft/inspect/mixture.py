"""How often a run sees each set of its mixture, and what share of samples and of supervised tokens it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from ..config.run import RunConfig
from ..data.order.interleave import Interleaving, quotas_of
from ..data.order.order import total_steps
from ..data.store.opened import Split


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


def mixture_table(config: RunConfig, train: Split) -> Table:
    """The same as a table."""
    table = Table(title="data.mixture over the run", title_justify="left", box=None)
    table.add_column("")
    for column in ("samples", "seen", "times each", "share of samples", "share of supervised tokens"):
        table.add_column(column, justify="right")
    for found in proportions(config, train):
        shares = (f"{found.times:.2f}", f"{found.share:.2%}", f"{found.token_share:.2%}")
        table.add_row(found.name, f"{found.samples:,}", f"{found.seen:,}", *shares)
    return table
