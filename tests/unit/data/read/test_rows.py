"""Tests of row readers: all file formats give the same rows, and errors name the location of malformed data."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dist_ft.data.read.faults import InvalidRow
from dist_ft.data.read.formats import normalise
from dist_ft.data.read.rows import read_rows
from dist_ft.data.read.sources import fingerprint
from dist_ft.errors import Problem, RequestError

ROWS = [{"text": 'Hej, "du"\nöäå 🙂', "other": "a"}, {"text": "zwei", "other": "b"}, {"text": "x,y", "other": ""}]


def read(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(source if isinstance(source, list) else str(source), **options)]


def fault(source: Any) -> Any:
    """Return the problem of the source, or that of its first invalid row."""
    try:
        placed = read_rows(source if isinstance(source, list) else str(source))
        place, row = next(pair for pair in placed if isinstance(pair[1], InvalidRow))
    except RequestError as error:
        return error.problems[0]
    return Problem(place, str(row), row.way_out)


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "other"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def zst(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    texts = {
        "a.jsonl": lines,
        "bom.jsonl": "\ufeff" + lines + "\n\n",
        "a.ndjson": lines + "\n",
        "lines.json": lines,
        "array.json": json.dumps(ROWS),
        "indented.json": "\n" + json.dumps(ROWS, indent=2),
        "object.json": json.dumps({"version": 1, "data": ROWS}, indent=1),
        "flat_object.json": json.dumps({"version": 1, "data": ROWS}),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}
    for ending, compress in packed.items():
        (tmp_path / f"a.jsonl.{ending}").write_bytes(compress(lines.encode()))
    (tmp_path / "two_frames.jsonl.zst").write_bytes(zst(lines.encode()[:9]) + zst(lines.encode()[9:]))
    table = pyarrow.Table.from_pylist(ROWS)
    for name, kind in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with kind(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "a.tsv", "\t")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == ROWS, path.name


def test_places_are_lines_and_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    write_csv(tmp_path / "a.csv")
    places = [place.rsplit(":")[-1] for place, _ in read_rows(str(tmp_path / "a.jsonl"))]
    assert places == ["2", "4"]
    assert [place.rsplit(":")[-1] for place, _ in read_rows(str(tmp_path / "a.csv"))] == ["2", "4", "5"]


def test_text_is_a_document_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n\n  \n three\n", encoding="utf-8")
    placed = [(place.rsplit(":")[-1], row) for place, row in read_rows(str(tmp_path / "a.txt"))]
    assert placed == [("3", {"text": "one\ntwo"}), ("7", {"text": " three"})]


@pytest.mark.parametrize(
    ("sample_by", "rows"),
    [
        ("line", [("1", "Title"), ("3", " one"), ("4", "two"), ("6", "three")]),
        ("paragraph", [("1", "Title"), ("3", " one\ntwo"), ("6", "three")]),
        ("document", [("1", "Title\n\n one\ntwo\n\nthree")]),
    ],
)
def test_a_row_of_a_text_file_is_what_is_asked_for(tmp_path: Path, sample_by: Any, rows: Any) -> None:
    """The names are those of `datasets.load_dataset("text", sample_by=…)`; blank lines are no rows here."""
    (tmp_path / "a.txt").write_text("Title\n\n one\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("\n\n")
    placed = [(place.rsplit(":")[-1], row) for place, row in read_rows(str(tmp_path / "a.txt"), sample_by=sample_by)]
    assert placed == [(line, {"text": text}) for line, text in rows]
    with pytest.raises(RequestError, match="contains no rows"):
        read(tmp_path / "b.txt", sample_by=sample_by)


def test_globs_and_folders_are_sorted_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"n": name}))
    (tmp_path / "README.md").write_text("not data")
    assert [row["n"] for row in read(tmp_path)] == ["a", "b", "c"]
    assert [row["n"] for row in read(tmp_path / "[ac].jsonl")] == ["a", "c"]
    assert [row["n"] for row in read([str(tmp_path / "c.jsonl"), str(tmp_path / "a.jsonl")])] == ["c", "a"]


def test_a_file_of_a_package_is_found() -> None:
    rows = read("package:dist_ft/data/support_desk/train.jsonl")
    assert rows and "messages" in rows[0]
    assert "not installed" in fault("package:no_such_package_here/x.jsonl").rule


@pytest.mark.parametrize(
    ("name", "content", "place", "rule"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2", "the line is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', ":2", "the row is not an object (such as a list)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe5"}\n', ":2", "the line is not UTF-8 (such as byte 0xe5 at offset 16)"),
        ("a.jsonl", b"", "", "no rows"),
        ("a.jsonl", b"\n \n", "", "no rows"),
        ("a.json", b'[{"a": 1},\n {"a": ]', ":2", "invalid JSON in element 2"),
        ("a.json", b'[{"a": 1}', ":1", "invalid JSON in element 2"),
        ("a.json", b'{"a": 1}', "", "an object with 0 lists"),
        ("a.json", b'{"a":\n 1,,}', ":2", "invalid JSON"),
        ("a.json", b'[{"a": 1}, 3]', ":2", "the row is not an object (such as a number)"),
        ("a.csv", b"a,b\n1,2\n3\n", ":3", "fields differs from the header (such as 1 instead of 2)"),
        ("a.csv", b'a,b\n1,"2\n', ":2", "invalid CSV"),
        ("a.csv", b"a,a\n1,2\n", ":1", "duplicate column names: a"),
        ("a.csv", b"a,b\n", "", "no rows"),
        ("a.txt", b"\n\n", "", "no rows"),
        ("a.parquet", b"PAR1 not really", ":1", "is not valid Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "", "is not a complete .gz file"),
        ("a.jsonl.gz", b'{"a": 1}', "", "is not a complete .gz file"),
        ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n' * 99)[:-9], "", "is not a complete .bz2 file"),
        ("a.jsonl.bz2", b'{"a": 1}', "", "is not a complete .bz2 file"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 99)[:-9], "", "is not a complete .xz file"),
        ("a.jsonl.xz", b'{"a": 1}', "", "is not a complete .xz file"),
        ("a.jsonl.zst", zst(b'{"a": 1}\n' * 99)[:-3], "", "is not a complete .zst file"),
        ("a.jsonl.zst", b'{"a": 1}', "", "is not a complete .zst file"),
        ("a.arrow", b"ARROW1 not really", ":1", "is not valid Arrow"),
        ("a.jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}\n', ":1", "the same key several times (such as c)"),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', ":2", "the same key several times (such as a)"),
        ("a.json", b'{"data": [{"a": 1, "a": 2}]}', "", "the same key several times (such as a)"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", ":1", "nested too deeply"),
        ("a.json", b'[{"a": ' + b"[" * 100_000 + b"\n", ":1", "nested too deeply"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), ":1", "is UTF-16, not UTF-8"),
        ("a.csv", "a,b\n1,2".encode("utf-16-le"), ":1", "is UTF-16LE, not UTF-8"),
        ("a.txt", "a text".encode("utf-32"), ":1", "is UTF-32, not UTF-8"),
        ("a.csv", b"text;label\nx;1\n", ":1", "a single column, 'text;label', which contains ';'"),
        ("a.xlsx", b"x", "", "the file extension '.xlsx' is not supported"),
    ],
)
def test_broken_files_are_named_by_place(tmp_path: Path, name: str, content: bytes, place: str, rule: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problem = fault(path)
    assert problem.where == f"{path}{place}" and rule in problem.rule and problem.way_out


def test_rows_behind_an_invalid_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a"\n\xe5\n{"a": 2}\n[]\n{"a": 3, "a": 4}\n{"a": 5}\n')
    placed = list(read_rows(str(tmp_path / "a.jsonl")))
    assert [row for _, row in placed if isinstance(row, dict)] == [{"a": 1}, {"a": 2}, {"a": 5}]
    bad = [place.rsplit(":")[-1] for place, row in placed if isinstance(row, InvalidRow)]
    assert bad == ["2", "3", "5", "6"]
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n4,5\n")
    rows = [row for _, row in read_rows(str(tmp_path / "a.csv")) if isinstance(row, dict)]
    assert rows == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_a_delimiter_is_set_or_suggested(tmp_path: Path, delimiter: str) -> None:
    write_csv(tmp_path / "a.csv", delimiter)
    assert [row for _, row in read_rows(str(tmp_path / "a.csv"), delimiter=delimiter)] == ROWS
    assert f'data.delimiter="{delimiter}"' in fault(tmp_path / "a.csv").way_out
    (tmp_path / "b.csv").write_text("one; column\nx\n")  # with the delimiter given, the header is taken as it is
    assert [row for _, row in read_rows(str(tmp_path / "b.csv"), delimiter=",")] == [{"one; column": "x"}]


def test_an_encoding_is_named_with_its_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}'.encode("utf-16"))
    assert fault(tmp_path / "a.jsonl").way_out == "convert it: iconv -f UTF-16 -t utf-8 a.jsonl"


def test_questions_of_nested_squad_are_rows(tmp_path: Path) -> None:
    questions = [
        {
            "id": f"q{n}",
            "question": f"Who {n}?",
            "answers": [{"text": "Ada", "answer_start": 0}],
            "is_impossible": False,
        }
        for n in range(3)
    ]
    questions[2] = {**questions[2], "answers": [], "is_impossible": True}
    articles = [
        {"title": "One", "paragraphs": [{"context": "Ada came.", "qas": questions[:2]}]},
        {"title": "Two", "paragraphs": [{"context": "Ada won.", "qas": questions[2:]}, {"context": "No.", "qas": []}]},
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    expected = [
        {"title": article["title"], "context": paragraph["context"], **question}
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    placed = list(read_rows(str(tmp_path / "squad.json")))
    assert [row for _, row in placed] == expected
    places = [place.removeprefix(f"{tmp_path}/") for place, _ in placed]
    assert places == ["squad.json:1, question 1", "squad.json:1, question 2", "squad.json:2, question 1"]
    canonical = [normalise(row, "auto", {}) for _, row in placed]
    assert [row["answers"]["text"] for row in canonical] == [["Ada"], ["Ada"], []]


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "dialogues.jsonl").write_text("{}")
    assert str(tmp_path / "dialogues.jsonl") in fault(tmp_path / "dialogue.jsonl").way_out
    assert "dialogues.jsonl" in fault(tmp_path / "something_else.csv").way_out
    assert "matches no file" in fault(tmp_path / "*.csv").rule
    assert "no data file" in fault([str(_made(tmp_path / "empty"))]).rule


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_hub_ids_stream_and_say_when_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name:main/validation", revision="abc") == ROWS
    assert calls == [(("owner/name", "main"), {"split": "validation", "revision": "abc", "streaming": True})]
    read("owner/name")
    assert calls[1] == (("owner/name", None), {"split": "train", "revision": None, "streaming": True})
    assert read("owner/name:/train[1:]") == ROWS[1:]
    assert read("owner/name:main/train[:1]") == ROWS[:1]
    assert calls[3] == (("owner/name", "main"), {"split": "train", "revision": None, "streaming": True})

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    problem = fault("owner/name")
    assert "Couldn't reach" in problem.rule and "use local files" in problem.way_out


def test_class_numbers_of_the_hub_become_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    classes = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "tags": datasets.List(classes)})
    rows = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}]
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    assert read("owner/name") == [
        {"text": "a", "label": "pos", "tags": ["neg", "pos"]},
        {"text": "b", "label": None, "tags": []},
    ]


def test_a_large_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    row = json.dumps({"text": "x" * 10_000, "n": 1.5})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 3000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_rows(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < path.stat().st_size / 3


def test_an_array_on_one_line_is_understood_across_chunks(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"n": n, "text": "y" * (n % 7919)} for n in range(1500)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert read(tmp_path / "a.json") == rows


def test_the_fingerprint_follows_content_and_order_and_not_the_folder(tmp_path: Path) -> None:
    for folder, text in (("one", "{}"), ("two", "{}"), ("three", "{} ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(text)
        (tmp_path / folder / "b.jsonl").write_text('{"b": 1}')
    one, two, three = (fingerprint(str(tmp_path / folder)) for folder in ("one", "two", "three"))
    assert one == two != three
    files = [str(tmp_path / "one" / name) for name in ("a.jsonl", "b.jsonl")]
    assert fingerprint(files) == one != fingerprint(files[::-1])
    assert fingerprint("owner/name", "r1") != fingerprint("owner/name", "r2")


def test_a_broken_element_is_found_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = ['{"text": "' + "x" * 5000 + '"}'] * 2000
    rows[3] = '{"text": oops}'
    path.write_text("[" + ",\n".join(rows) + "]")
    tracemalloc.start()
    problem = fault(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problem.where == f"{path}:4" and "element 4" in problem.rule and peak < path.stat().st_size / 2
