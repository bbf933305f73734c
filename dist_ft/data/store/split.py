"""Preparation of one split: from its sources to a token table and samples."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ...config.run import RunConfig
from ...errors import RequestError
from ...protocols import Task
from ...state import ORIGIN, Example, Facts, Say
from ...storage.published import require_room
from ..read.augment import Augmenter
from ..read.chosen import choose, read_numbered
from ..read.faults import EMPTY_TEXT, InvalidRow, RowFault
from ..read.folders import COMPRESSED
from ..read.formats import normalise_for
from ..read.rows import RawRow
from ..read.sets import SplitName
from ..read.sources import HubSet, resolve
from .ledger import TOO_LONG, Ledger, too_long
from .pack import Samples, cut_blocks, in_groups, pack_best_fit, pack_in_order
from .repeats import DIGESTS, count_repeats, digest_rows
from .table import TableWriter, TokenTable

LEDGER = "ledger.json"
ROWS = "rows.jsonl"  # raw columns of each row that metrics need, see state.Layout.kept
TEXT_TASKS = ("causal_lm", "masked_lm")  # these tasks drop empty rows instead of raising an error
_REPORT_EVERY_S = 5.0
_PACKED_KINDS = (*COMPRESSED, ".parquet")
Encoder = Callable[[], Any]  # returns the ChatTokenizer; not called if the rows are already tokenized


def build_split(
    config: RunConfig, split: SplitName, task: Task, facts: Facts, encoder: Encoder, folder: Path, say: Say
) -> None:
    """Read, tokenize and pack a split, and write its table, samples and ledger into `folder`.

    Args:
        config: Configuration of the single dataset (see sets.py).
        split: Name of the split.
        task: Task that encodes the rows.
        facts: Facts about the data, stored in the ledger.
        encoder: Function that returns the ChatTokenizer.
        folder: Existing output folder.
        say: Callback for progress messages.

    Raises:
        RequestError: There are invalid rows (reported by cause and location), or no rows are left.
        MachineError: There is not enough disk space for the table.
    """
    copies = config.data.augment.copies if config.data.augment and split == "train" else 0
    require_room(folder, _needed_bytes(config, split) * (1 + copies))
    ledger, layout = Ledger(), task.layout
    with TableWriter(folder, layout.columns, layout.row_columns) as writer:
        kept = (folder / ROWS).open("w", encoding="utf-8") if layout.kept and split != "train" else None
        with kept or contextlib.nullcontext():
            _write_rows(config, split, task, encoder, writer, kept, ledger, say)
    if problems := ledger.problems(split, layout.limits):
        raise RequestError(*problems)
    if ledger.rows_kept == 0:
        causes = ", ".join(f"{tally.rows} {cause}" for cause, tally in ledger.dropped.items())
        rule = f"none of {ledger.rows_read} rows can be used ({causes})"
        raise RequestError.of(f"data.{split}", rule, "check task.overlong, task.unsupervised and the data")
    table = TokenTable.open(folder)
    digests = digest_rows(table, layout)
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


def encode_row(
    config: RunConfig, task: Task, encoder: Encoder, row: RawRow
) -> tuple[str, dict[str, Any], Sequence[Example]]:
    """Return the format of a row, its canonical form and its encoded sequences, without applying length limits.

    Raises:
        RowFault: The row is invalid (`InvalidRow`), or cannot be used for training.
    """
    name, canonical = normalise_for(config, row)
    return name, canonical, task.encode(canonical, None if name == "tokens" else encoder())


def limit_length(
    sequences: Sequence[Example], task: Task, overlong: str, place: str, ledger: Ledger, shorten: Callable[[], Any]
) -> Sequence[Example] | None:
    """Apply the length limits of the task to a row; return None if the row is dropped.

    Args:
        sequences: Encoded sequences of the row.
        task: Task with the length limits.
        overlong: Value of `task.overlong`: error, truncate or drop.
        place: Location of the row.
        ledger: Ledger in which the row is counted.
        shorten: Function that returns the truncated sequences.

    Raises:
        RowFault: The row is too long and `overlong` is error, or truncation leaves no supervised token.
    """
    layout = task.layout
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    if max(lengths) > ledger.longest:
        ledger.longest, ledger.longest_place = max(lengths), place
    limits = zip(lengths, itertools.cycle(layout.limits.items()) if layout.limits else (), strict=False)
    over = next((key for length, (key, limit) in limits if length > limit), None)
    if over is None or (layout.cuts_blocks and ledger.formats != ["tokens"]):
        return sequences
    if overlong == "drop":
        ledger.drop(too_long(over), place)
        return None
    if overlong == "error":
        ledger.longest_by_limit[over] = max(ledger.longest_by_limit.get(over, 0), *lengths)
        raise RowFault(too_long(over), "set task.overlong=truncate or drop")
    cut: Sequence[Example] = shorten()
    ledger.truncated.add(place)
    ledger.truncated_tokens += sum(lengths) - sum(len(sequence["input_ids"]) for sequence in cut)
    return cut


def _write_rows(
    config: RunConfig,
    split: SplitName,
    task: Task,
    encoder: Encoder,
    writer: TableWriter,
    kept: TextIO | None,
    ledger: Ledger,
    say: Say,
) -> None:
    told = time.monotonic()
    chosen = choose(config, split)
    if chosen is not None:
        ledger.chosen, ledger.rows_of_source = chosen.told, chosen.of
    augmenter = Augmenter.of(config, split)
    for number, place, row in read_numbered(config, split, chosen):
        ledger.rows_read += 1
        source = place.rpartition(":")[0]
        ledger.files[source] = ledger.files.get(source, 0) + 1
        try:
            name, canonical, sequences = encode_row(config, task, encoder, row)
            if name not in ledger.formats:
                ledger.formats.append(name)
            shorten = functools.partial(task.truncate, canonical, None if name == "tokens" else encoder())
            limited = limit_length(sequences, task, getattr(config.task, "overlong", "error"), place, ledger, shorten)
        except RowFault as fault:
            if _drops(config, fault):
                ledger.drop(fault.cause, place, fault.seen)
            elif ledger.refuse(fault, place):
                return
            continue
        if limited is not None:
            _write(limited, task, writer, ledger)
            if kept is not None:
                fields = {key: canonical[key] for key in task.layout.kept if key in canonical}
                kept.write(json.dumps(fields, ensure_ascii=False) + "\n")
            if augmenter is not None:
                for copy in augmenter.copies(canonical, number, place):
                    _write_copy(copy, f"{place} (augmented copy)", config, task, encoder, writer, ledger)
        if time.monotonic() - told > _REPORT_EVERY_S:
            told = time.monotonic()
            say(f"data.{split}: {ledger.rows_read} rows read, {writer.tokens} tokens")
    if augmenter is not None and ledger.rows_kept:
        augmenter.require_columns()


def _drops(config: RunConfig, fault: RowFault) -> bool:
    """Return whether a row that cannot be used is dropped as configured."""
    if isinstance(fault, InvalidRow):
        return config.data.invalid_rows == "drop"
    if fault.cause.startswith(TOO_LONG):
        return False  # limit_length decides about these
    blank = config.task.name in TEXT_TASKS and fault.cause == EMPTY_TEXT
    return blank or getattr(config.task, "unsupervised", "error") == "drop"


def _write_copy(
    copy: Mapping[str, Any] | None,
    place: str,
    config: RunConfig,
    task: Task,
    encoder: Encoder,
    writer: TableWriter,
    ledger: Ledger,
) -> None:
    """Write an augmented copy of a row; an unusable copy is skipped, since its original row is kept."""
    if copy is None:
        ledger.unchanged += 1
        return
    overlong = "truncate" if getattr(config.task, "overlong", "error") == "truncate" else "error"
    try:
        sequences = task.encode(copy, encoder())
        shorten = functools.partial(task.truncate, copy, encoder())
        limited = limit_length(sequences, task, overlong, place, ledger, shorten)
    except RowFault as fault:
        ledger.leave_out(fault, place)
        return
    assert limited is not None, "overlong is never drop here"
    ledger.augmented += 1
    _write(limited, task, writer, ledger)


def _write(sequences: Sequence[Example], task: Task, writer: TableWriter, ledger: Ledger) -> None:
    layout = task.layout
    for sequence in sequences:
        writer.append({**sequence, ORIGIN: [ledger.rows_kept]} if ORIGIN in layout.row_columns else sequence)
        ids = (token for column in layout.id_columns for token in sequence[column])
        ledger.max_token_id = max(ledger.max_token_id, *ids)
    ledger.rows_kept += 1


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
            size = source.stat().st_size
            needed += size * (12 if source.suffix.lower() in _PACKED_KINDS else 3)
    return needed
