"""What this machine lacks is told before workers start."""

from __future__ import annotations

import os

import pytest

from dist_ft.checks import machine
from dist_ft.checks.machine import check_machine
from dist_ft.launch.composition.compose import compose


def test_disk(tmp_path, monkeypatch):
    def problems(*words):
        return [problem.rule for problem in check_machine(compose(words).config)]

    assert problems(f"output_dir={tmp_path}/a/b/c") == []
    assert "is a file" in problems(f"output_dir={tmp_path}/rows.jsonl/x")[0]
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10 * 2**20}))
    assert "10 MiB are free" in problems(f"output_dir={tmp_path}/a")[0]
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "is not writable" in problems(f"output_dir={tmp_path}/a")[0]


def test_a_missing_library_is_told_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*words: str) -> list[str]:
        return [problem.where for problem in check_machine(compose(["track=off", *words]).config)]

    slurm = ["method=qlora", "launch=slurm", "launch.workers_per_node=1"]
    assert told("method=qlora") == []
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert told("method=qlora") == told("method=lora", "model.quantization=int8") == ["model.quantization"]
    assert told(*slurm) == ["model.quantization"] and told(*slurm, "launch.setup=['module load ours']") == []
    assert told("method=lora") == []
