"""One split from its sources to a table of tokens and a plan of samples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..schema import CausalLMConfig, RunConfig
from ..state import Task
from .cache import SplitName, require_room
from .faults import RowFault
from .formats import IGNORED_LABEL, check_task, detect, normalise
from .ledger import TOO_LONG, Ledger
from .pack import Samples, count_targets, cut_blocks, one_by_one, pack_best_fit, pack_in_order
from .rows import read_rows
from .sources import HubSet, resolve
from .table import TableWriter, TokenTable

LEDGER = "ledger.json"
COLUMNS = ("input_ids", "labels")

_REPORT_EVERY_S = 5.0
_PACKED_KINDS = (".gz", ".parquet")

Say = Callable[[str], None]
Encoder = Callable[[], Any]  # gives the ChatTokenizer; not called where rows are tokens already


def build_split(config: RunConfig, split: SplitName, task: Task, encoder: Encoder, folder: Path, say: Say) -> None:
    """Read, tokenise and pack a split into `folder`: table, samples, ledger.

    Raises:
        RequestError: rows that are wrong, by cause and with places; or none is left.
        MachineError: there is no room for the table.
    """
    sources = getattr(config.data, split)
    require_room(folder, _needed_bytes(sources))
    ledger = Ledger()
    with TableWriter(folder, COLUMNS) as writer:
        _write_rows(config, split, task, encoder, writer, ledger, say)
    if problems := ledger.problems(split, config.task.max_length):
        raise RequestError(*problems)
    if ledger.rows_kept == 0:
        causes = ", ".join(f"{tally.rows} {cause}" for cause, tally in ledger.dropped.items())
        rule = f"no row is left of {ledger.rows_read} ({causes})"
        raise RequestError.of(f"data.{split}", rule, "see task.overlong, task.unsupervised, and the data")
    table = TokenTable.open(folder)
    ledger.layout, samples = _plan(config, split, table, ledger)
    targets = count_targets(table, samples, IGNORED_LABEL)
    samples = samples.select(targets > 0)  # the last block may hold a single token
    samples.save(folder)
    ledger.tokens, ledger.samples, ledger.supervised_tokens = table.tokens, len(samples), int(targets.sum())
    ledger.tokens_in_samples = int(samples.lengths.sum())
    ledger.tokens_left_over = ledger.tokens - ledger.tokens_in_samples
    text = json.dumps(ledger.to_json(), ensure_ascii=False, indent=1)
    (folder / LEDGER).write_text(text, encoding="utf-8")


def encode_row(
    config: RunConfig, task: Task, encoder: Encoder, row: Mapping[str, Any], place: str
) -> tuple[str, Mapping[str, Sequence[int]]]:
    """The row's format and its tokens and labels, before any limit on length.

    Raises:
        RequestError: the row is not of the configured format, or not for the task.
        RowFault: nothing can be learned from it.
    """
    data = config.data
    name = (detect(row, data.columns) if data.format == "auto" else data.format) or "auto"
    canonical = normalise(row, name, data.columns, place)
    check_task(name, config.task.name, place)
    example = task.encode(canonical, None if name == "tokens" else encoder())
    if all(label == IGNORED_LABEL for label in example["labels"][1:]):
        raise RowFault("no label but perhaps the first token's is supervised", "see its labels")
    return name, example


def limit_length(
    example: Mapping[str, Sequence[int]], config: RunConfig, place: str, ledger: Ledger
) -> Mapping[str, Sequence[int]] | None:
    """The row within `task.max_length` as `task.overlong` says; None if it is to be dropped.

    Raises:
        RowFault: it is too long, and that is an error; or nothing supervised would be left.
    """
    task, length = config.task, len(example["input_ids"])
    if length > ledger.longest:
        ledger.longest, ledger.longest_place = length, place
    if length <= task.max_length or _cuts_blocks(config, ledger):
        return example
    if task.overlong == "drop":
        ledger.drop(TOO_LONG, place)
        return None
    if task.overlong == "error":
        raise RowFault(TOO_LONG, "set task.overlong")
    cut = {name: values[: task.max_length] for name, values in example.items()}
    if all(label == IGNORED_LABEL for label in cut["labels"][1:]):
        raise RowFault("all that is supervised stands behind task.max_length", "raise task.max_length")
    ledger.truncated.add(place)
    ledger.truncated_tokens += length - task.max_length
    return cut


def _write_rows(
    config: RunConfig, split: str, task: Task, encoder: Encoder, writer: TableWriter, ledger: Ledger, say: Say
) -> None:
    drops = getattr(config.task, "unsupervised", "error") == "drop"
    told = time.monotonic()
    for place, row in read_rows(getattr(config.data, split), revision=config.data.revision):
        ledger.rows_read += 1
        try:
            name, example = encode_row(config, task, encoder, row, place)
            if name not in ledger.formats:
                ledger.formats.append(name)
            kept = limit_length(example, config, place, ledger)
        except RowFault as fault:
            blank = isinstance(config.task, CausalLMConfig) and fault.cause == "the text is empty"
            if (drops and fault.cause != TOO_LONG) or blank:
                ledger.drop(fault.cause, place)
            elif ledger.refuse(fault, place):
                return
            continue
        if kept is not None:
            writer.append(kept)
            ledger.rows_kept += 1
            ledger.max_token_id = max(ledger.max_token_id, *kept["input_ids"], *kept["labels"])
        if time.monotonic() - told > _REPORT_EVERY_S:
            told = time.monotonic()
            say(f"data.{split}: {ledger.rows_read} rows read, {writer.tokens} tokens")


def _cuts_blocks(config: RunConfig, ledger: Ledger) -> bool:
    """Whether documents are cut into blocks; rows of tokens are used as they are, and packed whole."""
    return isinstance(config.task, CausalLMConfig) and config.task.packing and ledger.formats != ["tokens"]


def _plan(config: RunConfig, split: str, table: TokenTable, ledger: Ledger) -> tuple[str, Samples]:
    """How the split becomes samples. Evaluation packs only what would be too long for a row."""
    lengths, max_length = table.lengths, config.task.max_length
    if _cuts_blocks(config, ledger):
        return "blocks", cut_blocks(lengths, max_length)
    if not config.task.packing or split != "train":
        return "rows", one_by_one(lengths)
    if config.data.shuffle:
        return "packed, best fit", pack_best_fit(lengths, max_length)
    return "packed, in order", pack_in_order(lengths, max_length)


def _needed_bytes(sources: str | list[str]) -> int:
    """A rough upper bound of the table: two columns of 4 bytes, a token for each three bytes of text."""
    needed = 16 << 20
    for source in resolve(sources):
        if not isinstance(source, HubSet):
            size = source.stat().st_size
            needed += size * (12 if source.suffix.lower() in _PACKED_KINDS else 3)
    return needed
