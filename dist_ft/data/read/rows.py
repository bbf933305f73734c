"""Streaming readers that yield the raw rows of data files and Hub datasets, each with its location.

| extension | a row is |
| --- | --- |
| `.jsonl` `.ndjson` | a line with a JSON object; blank lines are skipped |
| `.json` | an element of the array, or of the only list in the object; JSON Lines are also accepted |
| `.csv` `.tsv` | a record with all values as strings; the first line is the header |
| `.parquet` `.arrow` | a row |
| `.txt` | a document, in the column `text`: a paragraph that ends at a blank line, a line, or the whole file |

An element of a `.json` file that is an article of SQuAD (`paragraphs` with `qas`) gives a row for each question.

Text files are UTF-8 and may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Memory use is bounded by the size of a row
(Parquet, Arrow: of a batch; a `.json` object: of the file), not by the size of the dataset.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

from ...config.data import SampleBy
from ...errors import RequestError
from .answers import flatten_articles
from .faults import InvalidRow
from .file.columnar import read_columnar, read_hub
from .file.csv_file import read_csv
from .file.json_file import JsonLine, read_json, read_json_lines
from .file.lines import kind_of, read_texts, wrong
from .folders import COMPRESSED, ending_of
from .remote import DataFile
from .sources import HubSet, open_file, resolve, unreadable

RawRow = dict[str, Any] | InvalidRow
Unparsed = Any  # a row as its file gives it, from which `parse_row` makes a RawRow
Placed = Iterator[tuple[str, RawRow]]


def read_rows(
    sources: str | list[str],
    *,
    revision: str | None = None,
    split: str = "train",
    delimiter: str | None = None,
    sample_by: SampleBy = "paragraph",
) -> Placed:
    """Yield `(place, row)` for the rows of all sources in order.

    The place is `FILE:LINE`. Parquet and Arrow files, Hub datasets and JSON arrays or objects have the row number
    instead of the line. A row that cannot be read is an `InvalidRow`, which says why, if those after it can be read.

    Args:
        sources: Sources as in the configuration.
        revision: Hub revision.
        split: Split to which the files of folders and globs must belong.
        delimiter: Delimiter of CSV files. Defaults to a comma, and a tab for `.tsv`.
        sample_by: What a row of a `.txt` file is.

    Raises:
        RequestError: A source does not exist, is empty, cannot be read or is malformed.
    """
    rows = read_unparsed(sources, revision=revision, split=split, delimiter=delimiter, sample_by=sample_by)
    return ((place, parse_row(row)) for place, row in rows)


def read_unparsed(
    sources: str | list[str],
    *,
    revision: str | None,
    split: str,
    delimiter: str | None,
    sample_by: SampleBy,
) -> Iterator[tuple[str, Unparsed]]:
    """Yield the same rows before `parse_row`, which does most of the work of reading JSON Lines."""
    for source in resolve(sources, split):
        empty = True
        for placed in _read_source(source, revision, delimiter, sample_by):
            empty = False
            yield placed
        if empty:
            raise wrong(str(source), "contains no rows", "remove this source, or use another one")


def _read_source(
    source: DataFile | HubSet, revision: str | None, delimiter: str | None, sample_by: SampleBy
) -> Iterator[tuple[str, Unparsed]]:
    return read_hub(source, revision) if isinstance(source, HubSet) else _read_file(source, delimiter, sample_by)


def parse_row(row: Unparsed) -> RawRow:
    """Return a row that `read_unparsed` yielded as an object, or why it cannot be read."""
    value = row.parse() if isinstance(row, JsonLine) else row
    if isinstance(value, dict | InvalidRow):
        return value
    return InvalidRow("the row is not an object", 'write rows as {"COLUMN": VALUE, …}', kind_of(value))


def _read_file(path: DataFile, delimiter: str | None, sample_by: SampleBy) -> Iterator[tuple[str, Any]]:
    ending, compression = ending_of(path), path.suffix.lower()
    try:
        if ending in (".parquet", ".arrow"):
            yield from read_columnar(path)
            return
        with open_file(path) as file:
            if ending in (".csv", ".tsv"):
                usual = "\t" if ending == ".tsv" else ","
                yield from read_csv(path, file, delimiter or usual, is_given=delimiter is not None)
            elif ending == ".json":
                yield from flatten_articles(read_json(path, file))
            elif ending == ".txt":
                yield from read_texts(path, file, sample_by)
            else:
                yield from read_json_lines(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _incomplete(path, error) from error
    except OSError as error:
        if compression in COMPRESSED and error.errno is None:  # of bz2 and pyarrow, which have no class of their own
            raise _incomplete(path, error) from error
        raise unreadable(path, error) from error


def _incomplete(path: DataFile, error: Exception) -> RequestError:
    rule = f"is not a complete {path.suffix.lower()} file ({error})"
    return wrong(str(path), rule, "write or copy the file again")
