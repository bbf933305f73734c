"""Readers of JSON Lines and of JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any, NamedTuple

from ..faults import InvalidRow
from ..remote import DataFile
from .lines import convert, decode, kind_of, read_lines, wrong, wrong_byte

_CHUNK = 1 << 20


class JsonLine(NamedTuple):
    """A line of a JSON Lines file that is not parsed yet, so that the process that encodes the row can parse it."""

    text: str

    def parse(self) -> Any:
        """Return the row in the line, or why it cannot be read."""
        return _parse(self.text, _LINES)


def read_json_lines(path: DataFile, file: IO[bytes]) -> Iterator[tuple[str, JsonLine | InvalidRow]]:
    """Yield the lines of a JSON Lines file that are not blank, with their numbers as the place.

    Raises:
        RequestError: The file is UTF-16 or UTF-32.
    """
    offset = 0
    for number, line in enumerate(file, start=1):
        place = f"{path}:{number}"
        try:
            if text := decode(line, number, path).strip():
                yield place, JsonLine(text)
        except UnicodeDecodeError as error:
            yield place, InvalidRow("the line is not UTF-8", convert(path, "latin1"), wrong_byte(error, offset))
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


_LINES = _Decoder()


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


def read_json(path: DataFile, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON file: the elements of its array or of the only list in its object, or JSON Lines.

    Raises:
        RequestError: The file is not valid JSON, or has no such list.
    """
    lines = read_lines(path, file)
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


def _parse_whole(path: DataFile, text: str) -> Any:
    decoder = _Decoder()
    try:
        value = decoder.check(decoder.decode(text))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise wrong(f"{path}{line}", f"invalid JSON: {_message(error)}", "fix the file") from error
    if isinstance(value, InvalidRow):
        raise wrong(str(path), str(value), value.way_out)
    return value


def _rows_of_object(path: DataFile, value: Any) -> Iterator[tuple[str, Any]]:
    lists = {name: item for name, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    if len(lists) != 1:
        rule = f"is {kind_of(value)} with {len(lists)} lists" if isinstance(value, dict) else f"is {kind_of(value)}"
        rule += "; rows must be an array, or the only list of an object"
        raise wrong(str(path), rule, "write one row per line (.jsonl)")
    for number, row in enumerate(next(iter(lists.values())), start=1):
        yield f"{path}:{number}", row


def _read_array(path: DataFile, first: str, lines: Iterator[tuple[int, str]], line: int) -> Iterator[tuple[str, Any]]:
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
                raise wrong(place, rule, "fix the file") from error
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
