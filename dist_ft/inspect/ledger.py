"""Tables that account for every row and token of a split."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from ..config.run import RunConfig
from ..data.order.proportions import proportions
from ..data.read.sets import key_of
from ..data.store.ledger import describe_files
from ..data.store.opened import Split


def ledger_tables(config: RunConfig, split: Split, name: str) -> Iterator[Table]:
    """Yield the ledger table of a split, or of each set of a mixture followed by the mixture table for training."""
    if not split.parts:
        yield ledger_table(split, f"data.{name}")
    for part, own in split.parts.items():
        yield ledger_table(own, key_of(part, name))
    if split.parts and name == "train":
        yield mixture_table(config, split)


def ledger_table(split: Split, title: str) -> Table:
    """Render the rows read, dropped, augmented and kept, and the tokens and samples, of a split of one set."""
    ledger = split.ledger
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    if ledger.get("chosen"):
        table.add_row("rows in the source", f"{ledger['rows_of_source']:,}", f"read: {ledger['chosen']}")
    table.add_row("rows read", f"{ledger['rows_read']:,}", ", ".join(ledger["formats"]))
    if len(ledger.get("files", {})) > 1:
        table.add_row("  of files", f"{len(ledger['files']):,}", describe_files(ledger["files"]))
    for cause, tally in ledger["dropped"].items():
        table.add_row("  dropped", f"{tally['rows']:,}", f"{cause}; first at {', '.join(tally['places'])}")
    if any(ledger.get(key) for key in ("augmented", "unchanged", "copies_left_out")):
        table.add_row("rows augmented", f"{ledger['augmented']:,}", f"{ledger['unchanged']:,} copies were unchanged")
    for cause, tally in ledger.get("copies_left_out", {}).items():
        table.add_row("  copies left out", f"{tally['rows']:,}", f"{cause}; first at {', '.join(tally['places'])}")
    table.add_row("rows kept", f"{ledger['rows_kept']:,}", "")
    if ledger["repeated"]:
        table.add_row("  repeated", f"{ledger['repeated']:,}", "have the same tokens as an earlier row")
    if ledger["truncated"]["rows"]:
        cut = f"{ledger['truncated']['tokens']:,} tokens; first at {', '.join(ledger['truncated']['places'])}"
        table.add_row("  truncated", f"{ledger['truncated']['rows']:,}", cut)
    table.add_row("tokens", f"{ledger['tokens']:,}", f"longest row {ledger['longest']:,}, at {ledger['longest_place']}")
    if ledger["tokens_left_over"]:
        table.add_row("  left over", f"{ledger['tokens_left_over']:,}", "in a block without supervised tokens")
    share = ledger["supervised_tokens"] / max(1, ledger["tokens"])
    table.add_row("supervised tokens", f"{ledger['supervised_tokens']:,}", f"{share:.0%} of the tokens enter the loss")
    table.add_row("samples", f"{ledger['samples']:,}", ledger["layout"])
    return table


def mixture_table(config: RunConfig, train: Split) -> Table:
    """Render how often each set of the mixture is seen during the run, and its shares of samples and tokens."""
    table = Table(title="data.mixture over the run", title_justify="left", box=None)
    table.add_column("")
    for column in ("samples", "seen", "epochs", "share of samples", "share of supervised tokens"):
        table.add_column(column, justify="right")
    for found in proportions(config, train):
        shares = (f"{found.times:.2f}", f"{found.share:.2%}", f"{found.token_share:.2%}")
        table.add_row(found.name, f"{found.samples:,}", f"{found.seen:,}", *shares)
    return table
