"""Lines of text files in UTF-8, and the documents of `.txt` files."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO, Any

from ....config.data import SampleBy
from ....errors import Problem, RequestError
from ..remote import DataFile


def read_lines(path: DataFile, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their line endings, without a byte order mark."""
    offset = 0
    for number, line in enumerate(file, start=1):
        try:
            yield number, decode(line, number, path)
        except UnicodeDecodeError as error:
            rule = f"is not UTF-8 ({wrong_byte(error, offset)})"
            raise wrong(f"{path}:{number}", rule, convert(path, "latin1")) from error
        offset += len(line)


def decode(line: bytes, number: int, path: DataFile) -> str:
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
        raise wrong(f"{path}:1", f"is {encoding}, not UTF-8", convert(path, encoding))
    return line.decode("utf-8-sig")


def convert(path: DataFile, encoding: str) -> str:
    """Return the command that converts a file to UTF-8."""
    unsure = " (replace latin1 with its encoding)" if encoding == "latin1" else ""
    return f"convert it: iconv -f {encoding} -t utf-8 {path.name}{unsure}"


def wrong_byte(error: UnicodeDecodeError, offset: int) -> str:
    """Return the byte that is not UTF-8 and its offset, of a line that starts at `offset`."""
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"


def read_texts(path: DataFile, file: IO[bytes], sample_by: SampleBy = "paragraph") -> Iterator[tuple[str, Any]]:
    """Yield the documents of a text file, in the column `text`: its lines, its paragraphs, or all of it."""
    if sample_by == "document":
        text = "".join(line for _, line in read_lines(path, file))
        if text.strip():
            yield f"{path}:1", {"text": text.strip("\r\n")}
        return
    paragraph: list[str] = []
    start = 1
    for number, line in read_lines(path, file):
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line)
        if paragraph and (sample_by == "line" or not line.strip()):
            yield f"{path}:{start}", {"text": "".join(paragraph).strip("\r\n")}
            paragraph = []
    if paragraph:
        yield f"{path}:{start}", {"text": "".join(paragraph).strip("\r\n")}


def wrong(place: str, rule: str, way_out: str) -> RequestError:
    """Return the error for a malformed file."""
    return RequestError(Problem(place, rule, way_out))


def kind_of(value: Any) -> str:
    """Return what a value of JSON is, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
