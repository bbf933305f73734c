"""Readers of Parquet files, Arrow files and Hub datasets, whose columns have types.

- Columns of class numbers (`ClassLabel`, which datasets stores in the schema) have class names.
- Objects inside lists, such as messages, lack the keys whose value is null: all objects of a column have the same
  keys, so a null may just mean that only other rows have the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ....errors import RequestError
from ..folders import ending_of
from ..remote import DataFile
from ..sources import HubSet

_BATCH = 256  # rows, fewer if they are large
_BATCH_BYTES = 32 << 20
_ARROW_FILE = b"ARROW1"  # first bytes of an Arrow file; without them it is a stream, as datasets writes


def read_columnar(path: DataFile) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet or Arrow file, with the 1-based row number as the place.

    Raises:
        RequestError: The file is malformed, or several columns or keys have the same name.
    """
    import pyarrow

    kind = "Parquet" if ending_of(path) == ".parquet" else "Arrow"
    number = 0
    try:
        for batch in _parquet_batches(path) if kind == "Parquet" else _arrow_batches(path):
            if number == 0:
                _check_names(batch.schema, str(path))
                classes = _classes_of_schema(batch.schema)
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", _plain(row, classes)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        rule = f"is not valid {kind} ({_first_line(error)})"
        raise RequestError.of(f"{path}:{number + 1}", rule, "write or copy the file again") from error


def read_hub(source: HubSet, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Stream the rows of a Hub dataset, with the 1-based row number as the place.

    Raises:
        RequestError: The dataset cannot be loaded.
    """
    import datasets

    way_out = "check the id, config and split (OWNER/NAME:CONFIG/SPLIT) and the network, or use local files"
    try:
        split, first, last = source.slice()  # streaming does not support split slicing
        rows = datasets.load_dataset(source.name, source.config, split=split, revision=revision, streaming=True)
        classes = _class_names(getattr(rows, "features", None) or {})
        for number, row in enumerate(islice(rows, first, last), start=first + 1):
            yield f"{source}:{number}", _plain(row, classes)
    except Exception as error:  # errors of datasets, the Hub client, HTTP and the data decoders share no base class
        raise RequestError.of(str(source), f"cannot be loaded from the Hub ({_first_line(error)})", way_out) from error


def _parquet_batches(path: DataFile) -> Iterator[Any]:
    import pyarrow.parquet

    with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
        average = sum(sizes) // max(1, file.metadata.num_rows)
        yield from file.iter_batches(batch_size=max(1, min(_BATCH, _BATCH_BYTES // max(1, average))))


def _arrow_batches(path: DataFile) -> Iterator[Any]:
    import pyarrow

    with path.open("rb") as opened:
        is_file = opened.read(len(_ARROW_FILE)) == _ARROW_FILE
        opened.seek(0)
        source = pyarrow.PythonFile(opened, "r")
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            yield from (batch.slice(start, _BATCH) for start in range(0, len(batch), _BATCH))


def _check_names(fields: Any, place: str) -> None:
    """Check that no two columns, and no two keys of an object, have the same name.

    Raises:
        RequestError: A name occurs twice; of two such columns a row would have only the last.
    """
    import pyarrow

    names = [field.name for field in fields]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        rule = f"duplicate column names: {', '.join(doubled)}"
        raise RequestError.of(place, rule, "give each column a unique name")
    for field in fields:
        inner = field.type
        while pyarrow.types.is_list(inner) or pyarrow.types.is_large_list(inner):
            inner = inner.value_type
        if pyarrow.types.is_struct(inner):
            _check_names(inner, f"{place}, {field.name}")


def _classes_of_schema(schema: Any) -> dict[str, list[str]]:
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    return _class_names(datasets.Features.from_arrow_schema(schema))


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names of each column of type ClassLabel or list of ClassLabel."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {column: feature.names for column, feature in inner.items() if type(feature).__name__ == "ClassLabel"}


def _plain(row: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    named = {column: _named(row[column], names) for column, names in classes.items()}
    return {**{column: _without_nulls(value) for column, value in row.items()}, **named}


def _named(value: Any, names: Sequence[str]) -> Any:
    """Replace class numbers with class names; numbers without a name, such as -1 for hidden labels, become None."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _without_nulls(value: Any, *, in_list: bool = False) -> Any:
    """Remove the null values of objects inside lists."""
    if isinstance(value, list):
        return [_without_nulls(item, in_list=True) for item in value]
    if isinstance(value, Mapping):
        kept = value.items() if not in_list else [(name, item) for name, item in value.items() if item is not None]
        return {name: _without_nulls(item, in_list=in_list) for name, item in kept}
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
