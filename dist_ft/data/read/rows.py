"""Streaming readers that yield the raw rows of data files and Hub datasets, each with its location.

| extension | a row is |
| --- | --- |
| `.jsonl` `.ndjson` | a line with a JSON object; blank lines are skipped |
| `.json` | an element of the array, or of the only list in the object; JSON Lines are also accepted |
| `.csv` `.tsv` | a record with all values as strings; the first line is the header |
| `.parquet` | a row |
| `.txt` | a document, in the column `text`: a paragraph that ends at a blank line |

Text files are UTF-8 and may be compressed with gzip (`.gz`). Memory use is bounded by the size of a row (Parquet: of a
batch; a `.json` object: of the file), not by the size of the dataset.
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
csv.field_size_limit(2**31 - 1)  # fields can be whole documents, longer than the default limit of 128 KiB
Placed = Iterator[tuple[str, dict[str, Any]]]


def read_rows(sources: str | list[str], *, revision: str | None = None) -> Placed:
    """Yield `(place, row)` for the rows of all sources in order.

    The place is `FILE:LINE`. Parquet files, Hub datasets and JSON arrays or objects have the row number instead of the
    line.

    Raises:
        RequestError: A source does not exist, is empty, cannot be read or is malformed.
    """
    for source in resolve(sources):
        rows = _read_hub(source, revision) if isinstance(source, HubSet) else _read_file(source)
        empty = True
        for place, row in rows:
            empty = False
            if not isinstance(row, dict):
                rule = f"the row is {_kind(row)}, not an object"
                raise _wrong(place, rule, 'write rows as {"COLUMN": VALUE, …}')
            yield place, row
        if empty:
            raise _wrong(str(source), "contains no rows", "remove this source, or use another one")


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
        raise _wrong(str(path), f"is not a complete gzip file ({error})", "write or copy the file again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their line endings, without a byte order mark."""
    offset = 0
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _wrong(
                f"{path}:{number}",
                f"is not UTF-8 (byte 0x{line[error.start]:02x} at offset {offset + error.start})",
                f"convert it: iconv -f latin1 -t utf-8 {path.name} (replace latin1 with its encoding)",
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
        raise _wrong(place, f"invalid JSON{column}: {message} in {shown!r}", "fix or remove the line") from error


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
    if following is not None and _is_object(first):  # JSON Lines in a .json file
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
        raise _wrong(f"{path}:{error.lineno}", f"invalid JSON: {error.msg}", "fix the file") from error


def _rows_of_object(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    lists = {name: item for name, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    if len(lists) != 1:
        rule = f"is {_kind(value)} with {len(lists)} lists" if isinstance(value, dict) else f"is {_kind(value)}"
        rule += "; rows must be an array, or the only list of an object"
        raise _wrong(str(path), rule, "write one row per line (.jsonl)")
    for number, row in enumerate(next(iter(lists.values())), start=1):
        yield f"{path}:{number}", row


def _read_array(path: Path, first: str, lines: Iterator[tuple[int, str]], line: int) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array that may be larger than memory, with their 1-based index as the place."""
    decoder = json.JSONDecoder()
    text, at, number, wanted, ended = first.lstrip()[1:], 0, 0, _CHUNK, False  # `line` is that of text[0]
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        try:
            value, stop = decoder.raw_decode(text, at)
            if stop < len(text) or ended:  # a number at the end of the chunk may continue in the next one
                number, at, wanted = number + 1, stop, _CHUNK
                yield f"{path}:{number}", value
                continue
        except json.JSONDecodeError as error:
            if ended or not _may_go_on(error):
                place = f"{path}:{line + text.count(chr(10), 0, error.pos)}"
                raise _wrong(place, f"invalid JSON in element {number + 1}: {error.msg}", "fix the file") from error
        line += text.count("\n", 0, at)
        more, ended = _take(lines, wanted)
        text, at, wanted = text[at:] + more, 0, wanted * 2  # doubling keeps parsing a large element linear


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Return whether the JSON may be invalid only because it is not read completely yet."""
    longest_word = len("-Infinity")
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - longest_word


def _take(lines: Iterator[tuple[int, str]], characters: int) -> tuple[str, bool]:
    """Return at least `characters` characters of the lines if available, and whether the lines are exhausted."""
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
            raise _wrong(place, f"duplicate column names: {', '.join(doubled)}", "give each column a unique name")
        place = f"{path}:{records.line_num + 1}"
        for record in records:
            if record:
                if len(record) != len(names):
                    rule = f"has {len(record)} fields, but the header has {len(names)}"
                    raise _wrong(place, rule, "quote fields that contain delimiters or line breaks")
                yield place, dict(zip(names, record, strict=True))
            place = f"{path}:{records.line_num + 1}"
    except csv.Error as error:
        raise _wrong(
            place, f"invalid CSV: {error}", 'quote fields with ", and write "" for a quote in a field'
        ) from error


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
        way_out = "write or copy the file again"
        raise _wrong(f"{path}:{number + 1}", f"is not valid Parquet ({_first_line(error)})", way_out) from error


def _read_hub(source: HubSet, revision: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    way_out = "check the id, config and split (OWNER/NAME:CONFIG/SPLIT) and the network, or use local files"
    try:
        split, first, last = source.slice()  # streaming does not support split slicing
        rows = datasets.load_dataset(source.name, source.config, split=split, revision=revision, streaming=True)
        classes = _class_names(getattr(rows, "features", None) or {})
        for number, row in enumerate(islice(rows, first, last), start=first + 1):
            named = {column: _named(row[column], names) for column, names in classes.items()}
            yield f"{source}:{number}", {**row, **named}
    except Exception as error:  # errors of datasets, the Hub client, HTTP and the data decoders share no base class
        raise _wrong(str(source), f"cannot be loaded from the Hub ({_first_line(error)})", way_out) from error


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names of each column of type ClassLabel or list of ClassLabel."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {column: feature.names for column, feature in inner.items() if type(feature).__name__ == "ClassLabel"}


def _named(value: Any, names: Sequence[str]) -> Any:
    """Replace class indices with class names; indices without a name, such as -1 for hidden labels, become None."""
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
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
