"""Reader of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO, Any

from ..faults import InvalidRow
from ..remote import DataFile
from .lines import read_lines, wrong

csv.field_size_limit(2**31 - 1)  # fields can be whole documents, longer than the default limit of 128 KiB


def read_csv(path: DataFile, file: IO[bytes], delimiter: str, *, is_given: bool) -> Iterator[tuple[str, Any]]:
    """Yield the records of a CSV file, with all values as strings and the line of the record as the place.

    Args:
        path: DataFile of the file.
        file: The opened file.
        delimiter: Delimiter of fields.
        is_given: Whether the user has set the delimiter, so that a header of a single column is meant.

    Raises:
        RequestError: The file is not CSV, or several columns have the same name.
    """
    records = csv.reader((line for _, line in read_lines(path, file)), delimiter=delimiter, strict=True)
    place = f"{path}:1"
    try:
        names = next(records, [])
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise wrong(place, f"duplicate column names: {', '.join(doubled)}", "give each column a unique name")
        other = next((sign for sign in ";\t|," if len(names) == 1 and sign in names[0]), None)
        if other is not None and not is_given:
            rule = f"the header has a single column, {names[0][:60]!r}, which contains {other!r}"
            way_out = f"set 'data.delimiter=\"{other}\"', or {delimiter!r} if this is the name of the column"
            raise wrong(place, rule, way_out)
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
        raise wrong(
            place, f"invalid CSV: {error}", 'quote fields with ", and write "" for a quote in a field'
        ) from error
