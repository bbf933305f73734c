"""Streaming readers that yield the raw rows of data files and Hub datasets, each with its location.

| extension | a row is |
| --- | --- |
| `.jsonl` `.ndjson` | a line with a JSON object; blank lines are skipped |
| `.json` | an element of the array, or of the only list in the object; JSON Lines are also accepted |
| `.csv` `.tsv` | a record with all values as strings; the first line is the header |
| `.parquet` `.arrow` | a row |
| `.txt` | a document, in the column `text`: a paragraph that ends at a blank line |

An element of a `.json` file that is an article of SQuAD (`paragraphs` with `qas`) gives a row for each question.

Text files are UTF-8 and may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Memory use is bounded by the size of a row
(Parquet, Arrow: of a batch; a `.json` object: of the file), not by the size of the dataset.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ...errors import Problem, RequestError
from .answers import flatten_articles
from .columnar import read_columnar, read_hub
from .faults import InvalidRow
from .folders import COMPRESSED, ending_of
from .sources import HubSet, open_file, resolve, unreadable

_CHUNK = 1 << 20
csv.field_size_limit(2**31 - 1)  # fields can be whole documents, longer than the default limit of 128 KiB
RawRow = dict[str, Any] | InvalidRow
Placed = Iterator[tuple[str, RawRow]]


def read_rows(
    sources: str | list[str], *, revision: str | None = None, split: str = "train", delimiter: str | None = None
) -> Placed:
    """Yield `(place, row)` for the rows of all sources in order.

    The place is `FILE:LINE`. Parquet and Arrow files, Hub datasets and JSON arrays or objects have the row number
    instead of the line. A row that cannot be read is an `InvalidRow`, which says why, if those after it can be read.

    Args:
        sources: Sources as in the configuration.
        revision: Hub revision.
        split: Split to which the files of folders and globs must belong.
        delimiter: Delimiter of CSV files. Defaults to a comma, and a tab for `.tsv`.

    Raises:
        RequestError: A source does not exist, is empty, cannot be read or is malformed.
    """
    for source in resolve(sources, split):
        rows = read_hub(source, revision) if isinstance(source, HubSet) else _read_file(source, delimiter)
        empty = True
        for place, row in rows:
            empty = False
            if not isinstance(row, dict | InvalidRow):
                yield place, InvalidRow("the row is not an object", 'write rows as {"COLUMN": VALUE, …}', _kind(row))
            else:
                yield place, row
        if empty:
            raise _wrong(str(source), "contains no rows", "remove this source, or use another one")


def _read_file(path: Path, delimiter: str | None) -> Iterator[tuple[str, Any]]:
    ending, compression = ending_of(path), path.suffix.lower()
    try:
        if ending in (".parquet", ".arrow"):
            yield from read_columnar(path)
            return
        with open_file(path) as file:
            if ending in (".csv", ".tsv"):
                usual = "\t" if ending == ".tsv" else ","
                yield from _read_csv(path, file, delimiter or usual, is_given=delimiter is not None)
            elif ending == ".json":
                yield from flatten_articles(_read_json(path, file))
            else:
                yield from (_read_text if ending == ".txt" else _read_jsonl)(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _incomplete(path, error) from error
    except OSError as error:
        if compression in COMPRESSED and error.errno is None:  # of bz2 and pyarrow, which have no class of their own
            raise _incomplete(path, error) from error
        raise unreadable(path, error) from error


def _incomplete(path: Path, error: Exception) -> RequestError:
    rule = f"is not a complete {path.suffix.lower()} file ({error})"
    return _wrong(str(path), rule, "write or copy the file again")


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their line endings, without a byte order mark."""
    offset = 0
    for number, line in enumerate(file, start=1):
        try:
            yield number, _decode(line, number, path)
        except UnicodeDecodeError as error:
            rule = f"is not UTF-8 ({_wrong_byte(error, offset)})"
            raise _wrong(f"{path}:{number}", rule, _convert(path, "latin1")) from error
        offset += len(line)


def _decode(line: bytes, number: int, path: Path) -> str:
    """Decode a line, without the byte order mark of the first.

    Raises:
        RequestError: The file is UTF-16 or UTF-32.
        UnicodeDecodeError: The line is not UTF-8.
    """
    if number > 1:
        return line.decode("utf-8")
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    encoding = next((name for mark, name in marks.items() if line.startswith(mark)), None)
    if encoding is None and b"\0" in line[:4]:  # without a mark
        encoding = "UTF-16LE" if line[1:2] == b"\0" else "UTF-16BE"
    if encoding is not None:
        raise _wrong(f"{path}:1", f"is {encoding}, not UTF-8", _convert(path, encoding))
    return line.decode("utf-8-sig")


def _convert(path: Path, encoding: str) -> str:
    unsure = " (replace latin1 with its encoding)" if encoding == "latin1" else ""
    return f"convert it: iconv -f {encoding} -t utf-8 {path.name}{unsure}"


def _wrong_byte(error: UnicodeDecodeError, offset: int) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"


def _read_jsonl(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    offset, decoder = 0, _Decoder()
    for number, line in enumerate(file, start=1):
        place = f"{path}:{number}"
        try:
            if text := _decode(line, number, path).strip():
                yield place, _parse(text, decoder)
        except UnicodeDecodeError as error:
            yield place, InvalidRow("the line is not UTF-8", _convert(path, "latin1"), _wrong_byte(error, offset))
        offset += len(line)


class _Decoder(json.JSONDecoder):
    """JSON decoder that collects the keys that occur several times in an object, of which it keeps the last."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.doubled: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.doubled += sorted({name for name in names if names.count(name) > 1})
        return found

    def check(self, value: Any) -> Any:
        """Return the value that was decoded last, or the fault if an object in it has a key several times."""
        doubled, self.doubled = self.doubled, []
        if not doubled:
            return value
        return InvalidRow("an object has the same key several times", "keep one of them", ", ".join(doubled))


def _parse(text: str, decoder: _Decoder) -> Any:
    """Return the row in a line of JSON, or why it cannot be read."""
    decoder.doubled.clear()
    try:
        return decoder.check(decoder.decode(text))
    except (ValueError, RecursionError) as error:
        column = f"column {error.colno} of " if isinstance(error, json.JSONDecodeError) else ""
        return InvalidRow(
            f"the line is not valid JSON ({_message(error)})", "fix the line", f"{column}{text.strip()[:60]!r}"
        )


def _message(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]


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
        decoder = _Decoder()
        for at, line in chain([(number, first), following], lines):
            if line.strip():
                yield f"{path}:{at}", _parse(line, decoder)
        return
    text = first + (following[1] if following else "") + "".join(line for _, line in lines)
    yield from _rows_of_object(path, _parse_whole(path, text))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_whole(path: Path, text: str) -> Any:
    decoder = _Decoder()
    try:
        value = decoder.check(decoder.decode(text))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _wrong(f"{path}{line}", f"invalid JSON: {_message(error)}", "fix the file") from error
    if isinstance(value, InvalidRow):
        raise _wrong(str(path), str(value), value.way_out)
    return value


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
    decoder = _Decoder()
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
                yield f"{path}:{number}", decoder.check(value)
                continue
        except (ValueError, RecursionError) as error:
            if ended or not _may_go_on(error):
                pos = error.pos if isinstance(error, json.JSONDecodeError) else at
                place = f"{path}:{line + text.count(chr(10), 0, pos)}"
                rule = f"invalid JSON in element {number + 1}: {_message(error)}"
                raise _wrong(place, rule, "fix the file") from error
        decoder.doubled.clear()
        line += text.count("\n", 0, at)
        more, ended = _take(lines, wanted)
        text, at, wanted = text[at:] + more, 0, wanted * 2  # doubling keeps parsing a large element linear


def _may_go_on(error: Exception) -> bool:
    """Return whether the JSON may be invalid only because it is not read completely yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
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


def _read_csv(path: Path, file: IO[bytes], delimiter: str, *, is_given: bool) -> Iterator[tuple[str, Any]]:
    records = csv.reader((line for _, line in _lines(path, file)), delimiter=delimiter, strict=True)
    place = f"{path}:1"
    try:
        names = next(records, [])
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise _wrong(place, f"duplicate column names: {', '.join(doubled)}", "give each column a unique name")
        other = next((sign for sign in ";\t|," if len(names) == 1 and sign in names[0]), None)
        if other is not None and not is_given:
            rule = f"the header has a single column, {names[0][:60]!r}, which contains {other!r}"
            way_out = f"set 'data.delimiter=\"{other}\"', or {delimiter!r} if this is the name of the column"
            raise _wrong(place, rule, way_out)
        place = f"{path}:{records.line_num + 1}"
        for record in records:
            if record and len(record) != len(names):
                way_out = "quote fields that contain delimiters or line breaks"
                seen = f"{len(record)} instead of {len(names)}"
                yield place, InvalidRow("the number of fields differs from the header", way_out, seen)
            elif record:
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


def _wrong(place: str, rule: str, way_out: str) -> RequestError:
    return RequestError(Problem(place, rule, way_out))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
