"""Encoding of rows into columns of token ids, by this process or another one."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.run import RunConfig
from ...protocols import Task
from ...state import ORIGIN, Example, Layout
from ..read.augment import Augmenter
from ..read.faults import EMPTY_TEXT, InvalidRow, RowFault
from ..read.formats import normalise_for
from ..read.rows import Unparsed, parse_row
from ..read.sets import SplitName
from .ledger import TOO_LONG, Ledger, too_long
from .repeats import digest_rows
from .table import TokenTable

if TYPE_CHECKING:
    from ..render.template import ChatTokenizer

TEXT_TASKS = ("causal_lm", "masked_lm")  # these tasks drop empty rows instead of raising an error
Numbered = tuple[int, str, Unparsed]  # index in the source, place and row


class Encoder:
    """The ChatTokenizer of a run, which is opened by the first call; a copy in another process opens its own.

    Args:
        config: Configuration of the run.
        folder: Folder of the tokenizer.
    """

    def __init__(self, config: RunConfig, folder: str) -> None:
        self.config, self.folder = config, folder
        self._opened: ChatTokenizer | None = None

    def __call__(self) -> ChatTokenizer:
        if self._opened is None:
            from ..render.special_text import open_chat_tokenizer

            self._opened = open_chat_tokenizer(self.config, self.folder)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


@dataclass
class EncodedRows:
    """The sequences of consecutive rows, and the ledger of these rows alone."""

    table: TokenTable  # in memory; ORIGIN counts from the first of these rows
    digests: np.ndarray  # [rows_kept] uint64, see repeats.py
    ledger: Ledger
    kept: list[dict[str, Any]]  # columns of the rows that metrics need, see `Layout.kept`
    augmented: set[str]  # columns to augment that a row had


@dataclass
class RowEncoder:
    """Function that encodes rows of a split; it can be sent to other processes.

    Args:
        config: Configuration of the single dataset (see sets.py).
        split: Name of the split.
        task: Task that encodes the rows.
        encoder: Function that returns the ChatTokenizer; not called if the rows are already tokenized.
    """

    config: RunConfig
    split: SplitName
    task: Task
    encoder: Callable[[], Any]
    _augmenter: list[Augmenter | None] = field(default_factory=list)  # empty until the first rows, in each process

    def __call__(self, rows: Sequence[Numbered]) -> EncodedRows:
        """Encode rows and count them in a ledger; rows that cannot be used are only counted.

        Raises:
            RequestError: A key of the configuration does not match the data.
        """
        with _collecting_later():
            return self._encode_all(rows)

    def _encode_all(self, rows: Sequence[Numbered]) -> EncodedRows:
        layout, ledger = self.task.layout, Ledger()
        written, kept = Sequences(layout), list[dict[str, Any]]()
        augmenter = self._find_augmenter()
        for number, place, row in rows:
            ledger.rows_read += 1
            source = place.rpartition(":")[0]
            ledger.files[source] = ledger.files.get(source, 0) + 1
            try:
                canonical, sequences = self._encode(row, place, ledger)
            except RowFault as fault:
                if self._drops(fault):
                    ledger.drop(fault.cause, place, fault.seen)
                else:
                    ledger.refuse(fault, place)
                continue
            if sequences is None:
                continue
            written.add(sequences, ledger)
            if layout.kept and self.split != "train":
                kept.append({key: canonical[key] for key in layout.kept if key in canonical})
            for copy in augmenter.copies(canonical, number, place) if augmenter else ():
                self._add_copy(copy, f"{place} (augmented copy)", written, ledger)
        table = written.table()
        ledger.max_token_id = _largest_id(table, layout)
        return EncodedRows(table, digest_rows(table, layout), ledger, kept, augmenter.met if augmenter else set())

    def _find_augmenter(self) -> Augmenter | None:
        if not self._augmenter:
            self._augmenter.append(Augmenter.of(self.config, self.split))
        return self._augmenter[0]

    def _encode(self, row: Unparsed, place: str, ledger: Ledger) -> tuple[dict[str, Any], Sequence[Example] | None]:
        name, canonical, sequences = encode_row(self.config, self.task, self.encoder, row)
        if name not in ledger.formats:
            ledger.formats.append(name)
        tokenized = name == "tokens"
        shorten = functools.partial(self.task.truncate, canonical, None if tokenized else self.encoder())
        overlong = getattr(self.config.task, "overlong", "error")
        return canonical, limit_length(sequences, self.task, overlong, place, ledger, shorten, tokenized=tokenized)

    def _drops(self, fault: RowFault) -> bool:
        """Return whether a row that cannot be used is dropped as configured."""
        task = self.config.task
        if isinstance(fault, InvalidRow):
            return self.config.data.invalid_rows == "drop"
        if fault.cause.startswith(TOO_LONG):
            return False  # limit_length decides about these
        blank = task.name in TEXT_TASKS and fault.cause == EMPTY_TEXT
        return blank or getattr(task, "unsupervised", "error") == "drop"

    def _add_copy(self, copy: Mapping[str, Any] | None, place: str, written: Sequences, ledger: Ledger) -> None:
        """Add an augmented copy of a row; an unusable copy is skipped, since its original row is kept."""
        if copy is None:
            ledger.unchanged += 1
            return
        task = self.task
        overlong = "truncate" if getattr(self.config.task, "overlong", "error") == "truncate" else "error"
        try:
            shorten = functools.partial(task.truncate, copy, self.encoder())
            limited = limit_length(task.encode(copy, self.encoder()), task, overlong, place, ledger, shorten)
        except RowFault as fault:
            ledger.leave_out(fault, place)
            return
        assert limited is not None, "overlong is never drop here"
        ledger.augmented += 1
        written.add(limited, ledger)


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """Search for garbage in cycles behind the rows of a call, which are few, and not again and again among them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Sequences:
    """Encoded sequences that are collected into a table in memory."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._lengths: list[int] = []
        self._columns: dict[str, list[Sequence[int]]] = {name: [] for name in layout.columns}
        self._row_columns: dict[str, list[Sequence[int]]] = {name: [] for name in layout.row_columns}

    def add(self, sequences: Iterable[Example], ledger: Ledger) -> None:
        """Add the sequences of a row, and count the row in the ledger."""
        for sequence in sequences:
            given = {**sequence, ORIGIN: [ledger.rows_kept]} if ORIGIN in self._row_columns else sequence
            length = len(given[self.layout.columns[0]])
            assert all(len(given[name]) == length for name in self._columns), "columns of a row have the same length"
            for columns in (self._columns, self._row_columns):
                for name, parts in columns.items():
                    parts.append(given[name])
            self._lengths.append(length)
        ledger.rows_kept += 1

    def table(self) -> TokenTable:
        """Return the table of all sequences."""
        columns = {name: _joined(parts) for name, parts in self._columns.items()}
        row_columns = {name: (_joined(parts), _offsets(map(len, parts))) for name, parts in self._row_columns.items()}
        return TokenTable(columns, _offsets(self._lengths), row_columns)


def _joined(parts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int32, count=sum(map(len, parts)))


def _largest_id(table: TokenTable, layout: Layout) -> int:
    """Return the largest token id of a table, or -1 if it is empty."""
    columns = {**table.columns, **{name: values for name, (values, _) in table.row_columns.items()}}
    return max(int(columns[name].max(initial=-1)) for name in layout.id_columns)


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def encode_row(
    config: RunConfig, task: Task, encoder: Callable[[], Any], row: Unparsed
) -> tuple[str, dict[str, Any], Sequence[Example]]:
    """Return the format of a row, its canonical form and its encoded sequences, without applying length limits.

    Raises:
        RowFault: The row is invalid (`InvalidRow`), or cannot be used for training.
    """
    name, canonical = normalise_for(config, parse_row(row))
    return name, canonical, task.encode(canonical, None if name == "tokens" else encoder())


def limit_length(
    sequences: Sequence[Example],
    task: Task,
    overlong: str,
    place: str,
    ledger: Ledger,
    shorten: Callable[[], Any],
    *,
    tokenized: bool = False,
) -> Sequence[Example] | None:
    """Apply the length limits of the task to a row; return None if the row is dropped.

    Args:
        sequences: Encoded sequences of the row.
        task: Task with the length limits.
        overlong: Value of `task.overlong`: error, truncate or drop.
        place: Location of the row.
        ledger: Ledger in which the row is counted.
        shorten: Function that returns the truncated sequences.
        tokenized: Whether the row was given as token ids, which are never cut into blocks.

    Raises:
        RowFault: The row is too long and `overlong` is error, or truncation leaves no supervised token.
    """
    layout = task.layout
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    if max(lengths) > ledger.longest:
        ledger.longest, ledger.longest_place = max(lengths), place
    limits = zip(lengths, itertools.cycle(layout.limits.items()) if layout.limits else (), strict=False)
    over = next((key for length, (key, limit) in limits if length > limit), None)
    if over is None or (layout.cuts_blocks and not tokenized):
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
