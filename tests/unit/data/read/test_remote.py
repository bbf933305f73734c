"""Data behind URLs is read through fsspec: the same rows as from local files, and errors that name what is missing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dist_ft.data.read.rows import read_rows
from dist_ft.data.read.sources import fingerprint, survey
from dist_ft.errors import MachineError, RequestError


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(source: str | list[str], split: str = "train") -> list[str]:
    return [row["text"] for _, row in read_rows(source, split=split) if isinstance(row, dict)]


def test_every_kind_of_file_is_read(memory: Any, tmp_path: Path) -> None:
    import bz2
    import io
    import lzma

    import pyarrow
    import pyarrow.parquet

    table, parquet, stream = pyarrow.table({"text": ["a", "b"]}), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    plain = lines("a", "b")
    contents = {
        "rows.jsonl": plain,
        "rows.jsonl.gz": gzip.compress(plain),
        "rows.jsonl.bz2": bz2.compress(plain),
        "rows.jsonl.xz": lzma.compress(plain),
        "rows.jsonl.zst": bytes(pyarrow.compress(plain, codec="zstd", asbytes=True)),
        "rows.json": b'[{"text": "a"}, {"text": "b"}]',
        "rows.csv": b"text\na\nb\n",
        "rows.txt": b"a\n\nb\n",
        "rows.parquet": parquet.getvalue(),
        "rows.arrow": stream.getvalue(),
    }
    for name, content in contents.items():
        memory.pipe(f"/bucket/{name}", content)
        (tmp_path / name).write_bytes(content)
        for url in (f"memory://bucket/{name}", f"file://{tmp_path / name}"):
            assert texts(url) == ["a", "b"], url
    assert [place for place, _ in read_rows("memory://bucket/rows.jsonl")][1] == "memory://bucket/rows.jsonl:2"


@pytest.mark.parametrize("source", ["{}", "{}/*.jsonl", "{}/train-*"])
def test_folders_and_globs_are_those_of_local_files(memory: Any, tmp_path: Path, source: str) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "validation-0.jsonl", "README.md", "sub/other.jsonl"):
        memory.pipe(f"/bucket/set/{name}", lines(name))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    url = source.format("memory://bucket/set")
    there, here = survey(url), survey(source.format(tmp_path))
    assert [file.name for file in there.read] == [file.name for file in here.read] == ["train-0.jsonl", "train-1.jsonl"]
    said = [[(reason, *(p.name for p in paths)) for reason, paths in found.left_out.items()] for found in (there, here)]
    assert sorted(said[0]) == sorted(said[1])
    assert texts([url, "memory://bucket/set/sub/other.jsonl"])[2:] == ["sub/other.jsonl"]


def test_the_only_subfolder_and_splits_by_folder(memory: Any) -> None:
    memory.pipe("/bucket/repository/data/train.jsonl", lines("a"))
    memory.pipe("/bucket/parts/train/x.jsonl", lines("b"))
    memory.pipe("/bucket/parts/test/x.jsonl", lines("c"))
    assert texts("memory://bucket/repository") == ["a"]
    assert texts("memory://bucket/parts") == ["b"] and texts("memory://bucket/parts/", "test") == ["c"]


def test_the_fingerprint_follows_the_content(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/bucket/a.jsonl", lines("a"))
    memory.pipe("/bucket/b.jsonl", lines("a"))
    first, other = fingerprint("memory://bucket/a.jsonl"), fingerprint("memory://bucket/b.jsonl")
    assert first == fingerprint("memory://bucket/a.jsonl") != other
    memory.pipe("/bucket/a.jsonl", lines("b"))
    assert fingerprint("memory://bucket/a.jsonl") != first
    kind = type(memory)
    told: dict[str, Any] = {"size": 12, "type": "file", "name": "/bucket/a.jsonl"}
    monkeypatch.setattr(kind, "info", lambda self, path, **_: told)
    of_content = fingerprint("memory://bucket/a.jsonl")  # neither an ETag nor a time
    memory.pipe("/bucket/a.jsonl", lines("c"))
    assert fingerprint("memory://bucket/a.jsonl") != of_content
    told["ETag"] = '"1"'
    tagged = fingerprint("memory://bucket/a.jsonl")
    memory.pipe("/bucket/a.jsonl", lines("d"))
    assert fingerprint("memory://bucket/a.jsonl") == tagged


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("memory://bucket/none.jsonl", "memory://bucket/none.jsonl: the file or folder does not exist"),
        ("memory://bucket/set/*.csv", "contains no data file"),
        ("memory://bucket/set/a.bin", "the file extension '.bin' is not supported"),
        ("nowhere://bucket/a.jsonl", "the protocol nowhere:// is not known"),
        ("s3://key:secret@bucket/a.jsonl", "contains a user name or password"),
        ("https://host/a.jsonl?signature=secret", "addresses with a query are not supported"),
    ],
)
def test_what_cannot_be_read_is_said_without_secrets(memory: Any, source: str, said: str) -> None:
    memory.pipe("/bucket/set/a.bin", b"")
    with pytest.raises(RequestError) as caught:
        list(read_rows(source))
    assert said in str(caught.value) and "secret" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import known_implementations

    kept = {"class": "gone3fs.FileSystem", "err": "Install gone3fs to access Gone"}
    monkeypatch.setitem(known_implementations, "gone", kept)
    with pytest.raises(MachineError) as caught:
        list(read_rows("gone://bucket/a.jsonl"))
    assert "pip install gone3fs" in str(caught.value) and caught.value.exit_code == 3
