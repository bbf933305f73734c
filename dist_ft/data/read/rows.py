"""Rows of data as they stand in their files, one at a time and each with its place.

| ending | a row is |
| --- | --- |
| `.jsonl` `.ndjson` | a line with a JSON object; blank lines are skipped |
| `.json` | an element of the array, or of the only list in the object; JSON Lines are understood too |
| `.csv` `.tsv` | a record, all its fields text; the first line names the columns |
| `.parquet` | a row |
| `.txt` | a document: a paragraph, which ends at a blank line; its column is `text` |

Text kinds are UTF-8 and may be packed by gzip (`.gz`). Memory is bounded by a row (Parquet: a batch; a `.json` that
is an object: the file), never by the data set.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from ...errors import Problem, RequestError
from .sources import HubSet, ending_of, resolve, unreadable

_CHUNK = 1 << 20
_PARQUET_BATCH = 256
csv.field_size_limit(2**31 - 1)  # a field is a document; the library's limit of 128 KiB is for spreadsheets
Placed = Iterator[tuple[str, dict[str, Any]]]


def read_rows(sources: str | list[str], *, revision: str | None = None) -> Placed:
    """Yield `(place, row)` of every source in order; a place is `FILE:LINE` (Parquet and hub: the row's number).

    Raises:
        RequestError: a source names nothing, is empty, cannot be read, or breaks its format; with the place.
    """
    for source in resolve(sources):
        rows = _read_hub(source, revision) if isinstance(source, HubSet) else _read_file(source)
        empty = True
        for place, row in rows:
            empty = False
            if not isinstance(row, dict):
                rule = f"a row is {_kind(row)}, not an object with named columns"
                raise _wrong(place, rule, 'write rows as {"COLUMN": VALUE, …}')
            yield place, row
        if empty:
            raise _wrong(str(source), "there are no rows in it", "name another source, or take this one out")


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    ending = ending_of(path)
    try:
        if ending == ".parquet":
            yield from _read_parquet(path)
            return
        opener: Callable[..., IO[bytes]] = gzip.open if path.suffix.lower() == ".gz" else open  # type: ignore[assignment]
        with opener(path, "rb") as file:
            yield from _READERS[ending](path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _wrong(str(path), f"is not whole gzip data ({error})", "write or copy it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends; a byte order mark is taken off."""
    offset = 0
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _wrong(
                f"{path}:{number}",
                f"is not UTF-8 (byte 0x{line[error.start]:02x} at offset {offset + error.start})",
                f"convert it: iconv -f latin1 -t utf-8 {path.name} (or -f the encoding it has)",
            ) from error
        offset += len(line)
        yield number, text


def _read_jsonl(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path, file):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        message = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        shown = text.strip()[:60]
        raise _wrong(place, f"broken JSON{column}: {message} in {shown!r}", "mend or remove the line") from error


def _read_json(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    lines = _lines(path, file)
    head: list[tuple[int, str]] = []
    for number, line in lines:
        head.append((number, line))
        if line.strip():
            break
    if not head or not head[-1][1].strip():
        return
    number, first = head[-1]
    if first.lstrip().startswith("["):
        yield from _read_array(path, first, lines, number)
        return
    following = next((pair for pair in lines if pair[1].strip()), None)
    if following is not None and _is_object(first):  # JSON Lines under the name of JSON
        yield f"{path}:{number}", json.loads(first)
        for number, line in chain([following], lines):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")
        return
    text = first + (following[1] if following else "") + "".join(line for _, line in lines)
    yield from _rows_of_object(path, _parse_whole(path, text))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _parse_whole(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(f"{path}:{error.lineno}", f"broken JSON: {error.msg}", "mend the file") from error


def _rows_of_object(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    lists = {name: item for name, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    if len(lists) != 1:
        rule = f"holds {_kind(value)} with {len(lists)} lists" if isinstance(value, dict) else f"holds {_kind(value)}"
        rule += "; rows are an array or the only list of an object"
        raise _wrong(str(path), rule, "write one row a line (.jsonl)")
    for number, row in enumerate(next(iter(lists.values())), start=1):
        yield f"{path}:{number}", row


def _read_array(path: Path, first: str, lines: Iterator[tuple[int, str]], line: int) -> Iterator[tuple[str, Any]]:
    """The elements of an array that may be larger than memory; a place is an element's number."""
    decoder = json.JSONDecoder()
    text, at, number, wanted, ended = first.lstrip()[1:], 0, 0, _CHUNK, False  # `line` is that of text[0]
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        try:
            value, stop = decoder.raw_decode(text, at)
            if stop < len(text) or ended:  # a number at the end of what was read may go on
                number, at, wanted = number + 1, stop, _CHUNK
                yield f"{path}:{number}", value
                continue
        except json.JSONDecodeError as error:
            if ended or not _may_go_on(error):
                place = f"{path}:{line + text.count(chr(10), 0, error.pos)}"
                raise _wrong(place, f"broken JSON in element {number + 1}: {error.msg}", "mend the file") from error
        line += text.count("\n", 0, at)
        more, ended = _take(lines, wanted)
        text, at, wanted = text[at:] + more, 0, wanted * 2  # doubling keeps a huge element linear


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Whether JSON may be broken only because not all of it was read yet."""
    longest_word = len("-Infinity")
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - longest_word


def _take(lines: Iterator[tuple[int, str]], characters: int) -> tuple[str, bool]:
    """At least so many characters of lines, and whether there are no more."""
    pieces, size = [], 0
    for _, piece in lines:
        pieces.append(piece)
        size += len(piece)
        if size >= characters:
            return "".join(pieces), False
    return "".join(pieces), True


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    records = csv.reader(
        (line for _, line in _lines(path, file)),
        delimiter="\t" if ending_of(path) == ".tsv" else ",",
        strict=True,
    )
    place = f"{path}:1"
    try:
        names = next(records, [])
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise _wrong(place, f"columns are named twice: {', '.join(doubled)}", "name each column once")
        place = f"{path}:{records.line_num + 1}"
        for record in records:
            if record:
                if len(record) != len(names):
                    rule = f"has {len(record)} fields where the first line names {len(names)}"
                    raise _wrong(place, rule, "quote fields that hold commas or line ends")
                yield place, dict(zip(names, record, strict=True))
            place = f"{path}:{records.line_num + 1}"
    except csv.Error as error:
        raise _wrong(place, f"broken CSV: {error}", 'quote fields with ", and double a quote inside one') from error


def _read_text(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    paragraph: list[str] = []
    start = 1
    for number, line in _lines(path, file):
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line)
        elif paragraph:
            yield f"{path}:{start}", {"text": "".join(paragraph).strip("\r\n")}
            paragraph = []
    if paragraph:
        yield f"{path}:{start}", {"text": "".join(paragraph).strip("\r\n")}


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        way_out = "write or copy it again"
        raise _wrong(f"{path}:{number + 1}", f"is not whole Parquet ({_first_line(error)})", way_out) from error


def _read_hub(source: HubSet, revision: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    way_out = "see id, config and split (OWNER/NAME:CONFIG/SPLIT) and the network, or name files that are here"
    try:
        split, first, last = source.slice()  # which streams do not know
        rows = datasets.load_dataset(source.name, source.config, split=split, revision=revision, streaming=True)
        classes = _class_names(getattr(rows, "features", None) or {})
        for number, row in enumerate(islice(rows, first, last), start=first + 1):
            named = {column: _named(row[column], names) for column, names in classes.items()}
            yield f"{source}:{number}", {**row, **named}
    except Exception as error:  # those of datasets, the hub's client, its transport and the data's decoders
        raise _wrong(str(source), f"the hub gives no such rows ({_first_line(error)})", way_out) from error


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each column that holds class numbers, or lists of them."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {column: feature.names for column, feature in inner.items() if type(feature).__name__ == "ClassLabel"}


def _named(value: Any, names: Sequence[str]) -> Any:
    """Class names for class numbers; a number without a class, such as the -1 of a hidden label, is no label."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


_READERS: dict[str, Callable[[Path, IO[bytes]], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}


def _wrong(place: str, rule: str, way_out: str) -> RequestError:
    return RequestError(Problem(place, rule, way_out))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
