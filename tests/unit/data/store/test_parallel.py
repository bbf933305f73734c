"""Rows are encoded in several processes as in one: the same files, ledger, errors and order."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_ft.config.run import RunConfig
from dist_ft.data.store import parallel
from dist_ft.errors import DistFtError, MachineError, RequestError
from dist_ft.prepare import prepare

CASES: dict[str, dict[str, Any]] = {
    "copies, dropped and packed": {
        "task": {"name": "instruction", "max_length": 40, "overlong": "drop", "packing": True},
        "data": {"augment": {"name": "RandomCharAug", "columns": ["prompt"], "options": {"action": "swap"}}},
    },
    "pairs": {"task": {"name": "preference", "max_length": 128}},
}


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Any:
    def config_of(processes: int | None, **changes: Any) -> RunConfig:
        content: dict[str, Any] = {
            "run_name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(tiny_llama)},
            "task": {"name": "instruction", "max_length": 256},
            "data": {
                "train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
                "num_proc": processes,
                "cache_dir": str(tmp_path / f"cache-{processes}"),
            },
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 2, "per_device_train_batch_size": 2},
            "track": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }
        for group, keys in changes.items():
            content[group] = {**content[group], **keys}
        return RunConfig.model_validate(content)

    return config_of


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ROWS_AT_ONCE", 3)


def write(path: Path, rows: range, preference: bool = False) -> None:
    def row(n: int) -> dict[str, Any]:
        prompt = {"prompt": f"question {n} " * (1 + n % 7)}
        return {**prompt, "chosen": f"yes {n}", "rejected": "no"} if preference else {**prompt, "completion": f"a {n}"}

    path.write_text("".join(json.dumps(row(n)) + "\n" for n in rows), encoding="utf-8")


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_processes_change_nothing(make: Any, tmp_path: Path) -> None:
    for name, changes in CASES.items():
        write(tmp_path / "a.jsonl", range(20), name == "pairs")
        write(tmp_path / "b.jsonl", range(14, 30), name == "pairs")
        one, three = (prepare(make(processes, **changes)).train for processes in (1, 3))
        assert Path(one.table).name == Path(three.table).name and one.ledger == three.ledger, name
        assert contents(one.table) == contents(three.table), name
        assert one.ledger["rows_read"] == 36 and set(one.ledger["files"].values()) == {20, 16}


@pytest.mark.parametrize("stop_after", [1000, 5])
def test_faults_are_reported_alike(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Invalid rows of all files are counted; after too many of them, what follows is not read (here: a torn file)."""
    monkeypatch.setattr("dist_ft.data.store.ledger.STOP_AFTER_FAULTS", stop_after)
    write(tmp_path / "a.jsonl", range(20))
    write(tmp_path / "b.jsonl", range(10))
    for name, line in (("a.jsonl", '{"prompt": "cut'), ("b.jsonl", '{"prompt": "x", "completion": 3}')):
        with (tmp_path / name).open("a") as file:
            file.write((line + "\n") * 7)
    (tmp_path / "c.csv").write_text('prompt,completion\nx,"y\n')
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.csv")][: 2 if stop_after == 1000 else 3]
    problems = []
    for processes in (1, 2):
        with pytest.raises(RequestError) as caught:
            prepare(make(processes, data={"train": sources, "num_proc": processes}))
        problems.append(caught.value.problems)
    assert problems[0] == problems[1]
    (found,) = problems[0]
    assert f"first at {tmp_path}/a.jsonl:21, {tmp_path}/a.jsonl:22, {tmp_path}/a.jsonl:23" in found.rule
    assert (f"{tmp_path}/b.jsonl:11" in found.rule) == (stop_after == 1000)


def test_a_fault_of_reading_is_raised_in_its_turn(make: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", range(20))
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(RequestError, match=r"b\.jsonl: contains no rows"):
        prepare(make(2))


class Killing:
    """Encodes rows until it kills the process that it is in."""

    def __call__(self, rows: Any) -> Any:
        if rows[0][0] >= 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


def test_a_killed_process_ends_with_an_error() -> None:
    rows = [(number, f"f.jsonl:{number + 1}", {}) for number in range(30)]
    with pytest.raises(MachineError) as caught:
        list(parallel.encode_in_order(Killing(), rows, 2))  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.where == "data.num_proc" and "was killed, at a row between f.jsonl:" in problem.rule
    assert isinstance(caught.value, DistFtError) and caught.value.exit_code == 3


class Resting:
    """Returns the rows with the process that has them."""

    def __call__(self, rows: Any) -> Any:
        return rows, os.getpid()


def test_few_rows_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "START_AFTER", 4)
    monkeypatch.setattr(parallel, "count_cores", lambda: 2)
    rows = [(number, "f:1", {}) for number in range(20)]
    few = list(parallel.encode_in_order(Resting(), rows[:12]))  # type: ignore[arg-type]
    assert {process for _, process in few} == {os.getpid()}  # type: ignore[misc]
    many = list(parallel.encode_in_order(Resting(), rows))  # type: ignore[arg-type]
    assert [row for portion, _ in many for row in portion] == rows  # type: ignore[misc,attr-defined]
    others = {process for _, process in many[4:]}  # type: ignore[misc]
    assert {process for _, process in many[:4]} == {os.getpid()} and os.getpid() not in others  # type: ignore[misc]
    assert not any(psutil.pid_exists(process) for process in others)
