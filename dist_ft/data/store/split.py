"""Preparation of one split: from its sources to a token table and samples."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...config.run import RunConfig
from ...errors import RequestError
from ...protocols import Task
from ...state import Facts, Say
from ...storage.published import require_room
from ..read.augment import require_columns
from ..read.chosen import choose, read_numbered
from ..read.folders import COMPRESSED
from ..read.sets import SplitName
from ..read.sources import HubSet, resolve, size_of
from .encode import EncodedRows, RowEncoder
from .ledger import Ledger
from .pack import Samples, cut_blocks, in_groups, pack_best_fit, pack_in_order
from .parallel import encode_in_order
from .repeats import DIGESTS, count_repeats
from .table import TableWriter, TokenTable

LEDGER = "ledger.json"
ROWS = "rows.jsonl"  # raw columns of each row that metrics need, see state.Layout.kept
_REPORT_EVERY_S = 5.0
_PACKED_KINDS = (*COMPRESSED, ".parquet")


def build_split(
    config: RunConfig,
    split: SplitName,
    task: Task,
    facts: Facts,
    encoder: Callable[[], Any],
    folder: Path,
    say: Say,
) -> None:
    """Read, tokenize and pack a split, and write its table, samples and ledger into `folder`.

    Args:
        config: Configuration of the single dataset (see sets.py).
        split: Name of the split.
        task: Task that encodes the rows.
        facts: Facts about the data, stored in the ledger.
        encoder: Function that returns the ChatTokenizer; not called if the rows are already tokenized.
        folder: Existing output folder.
        say: Callback for progress messages.

    Raises:
        RequestError: There are invalid rows (reported by cause and location), or no rows are left.
        MachineError: There is not enough disk space for the table.
    """
    copies = config.data.augment.copies if config.data.augment and split == "train" else 0
    require_room(folder, _needed_bytes(config, split) * (1 + copies))
    ledger, layout, digests_of_rows = Ledger(), task.layout, list[np.ndarray]()
    with TableWriter(folder, layout.columns, layout.row_columns) as writer:
        kept = (folder / ROWS).open("w", encoding="utf-8") if layout.kept and split != "train" else None
        with kept or contextlib.nullcontext():
            for rows in _encode_rows(config, split, RowEncoder(config, split, task, encoder), ledger, say):
                writer.extend(rows.table, ledger.rows_kept - rows.ledger.rows_kept)
                digests_of_rows.append(rows.digests)
                if kept is not None:
                    kept.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.kept)
    if problems := ledger.problems(split, layout.limits):
        raise RequestError(*problems)
    if ledger.rows_kept == 0:
        causes = ", ".join(f"{tally.rows} {cause}" for cause, tally in ledger.dropped.items())
        rule = f"none of {ledger.rows_read} rows can be used ({causes})"
        raise RequestError.of(f"data.{split}", rule, "check task.overlong, task.unsupervised and the data")
    table = TokenTable.open(folder)
    digests = np.concatenate(digests_of_rows)
    np.save(folder / DIGESTS, digests)
    ledger.repeated = count_repeats(digests)
    ledger.layout, samples = _plan(config, split, task, table, ledger)
    targets = task.count_targets(table, samples)
    samples = samples.select(targets > 0)  # the last block may have a single token and thus no target
    samples.save(folder)
    ledger.tokens, ledger.samples, ledger.supervised_tokens = table.tokens, len(samples), int(targets.sum())
    ledger.tokens_in_samples = int(samples.lengths.sum())
    ledger.tokens_left_over = ledger.tokens - ledger.tokens_in_samples
    content = {**ledger.to_json(), "facts": asdict(facts)}
    (folder / LEDGER).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _encode_rows(
    config: RunConfig, split: SplitName, encode: RowEncoder, ledger: Ledger, say: Say
) -> Generator[EncodedRows]:
    """Yield the encoded rows of the split in their order, after counting them in `ledger`."""
    chosen = choose(config, split)
    if chosen is not None:
        ledger.chosen, ledger.rows_of_source = chosen.told, chosen.of
    told, tokens, augmented = time.monotonic(), 0, set[str]()
    numbered = read_numbered(config, split, chosen)
    with closing(encode_in_order(encode, numbered, config.data.num_proc)) as encoded:
        for rows in encoded:
            ledger.merge(rows.ledger)
            augmented |= rows.augmented
            tokens += rows.table.tokens
            yield rows
            if ledger.is_hopeless:
                return
            if time.monotonic() - told > _REPORT_EVERY_S:
                told = time.monotonic()
                say(f"data.{split}: {ledger.rows_read} rows read, {tokens} tokens")
    if config.data.augment is not None and split == "train" and ledger.rows_kept:
        require_columns(config.data.augment, augmented)


def _plan(config: RunConfig, split: str, task: Task, table: TokenTable, ledger: Ledger) -> tuple[str, Samples]:
    """Return the layout name and the samples of the split; evaluation splits are cut into blocks but never packed."""
    lengths, layout = table.lengths, task.layout
    if layout.cuts_blocks and ledger.formats != ["tokens"]:  # tokenized rows are never cut
        return "blocks", cut_blocks(lengths, layout.limits["max_length"])
    if not layout.packs or split != "train":
        return "rows", in_groups(lengths, layout.sequences)
    if config.data.shuffle:
        return "packed, best fit", pack_best_fit(lengths, layout.limits["max_length"])
    return "packed, in order", pack_in_order(lengths, layout.limits["max_length"])


def _needed_bytes(config: RunConfig, split: SplitName) -> int:
    """Return a rough upper bound of the table size in bytes: two 4-byte columns, one token per three bytes of text."""
    needed = 16 << 20
    for source in resolve(config.data.sources(split) or [], config.data.source_split(split)):
        if not isinstance(source, HubSet):
            size = size_of(source)
            needed += size * (12 if source.suffix.lower() in _PACKED_KINDS else 3)
    return needed
