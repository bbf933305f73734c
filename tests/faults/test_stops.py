"""Signals to the command, its launcher or a rank, in every phase: exit code 75, and the same bits when it goes on."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reports import status_in_report

pytestmark = [pytest.mark.faults, pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(280)]

STEPS = 6
WORDS = [
    *(f"train.max_steps={STEPS}", "train.eval_steps=3", "optim.lr_scheduler_type=linear"),
    *("method=lora", "method.lora_dropout=0.2", "train.save_minutes=60"),
]
SLOW = {  # a function of each phase, and how long it takes in a run that is stopped there
    "preparation": ("dist_ft.data.store.split:build_split", 2),
    "loading": ("dist_ft.families:ModelRecipe.build", 2),
    "step": ("dist_ft.loop:train_step", 0.4),
    "evaluation": ("dist_ft.loop:evaluate", 1),
    "save": ("torch.distributed.checkpoint.filesystem:_write_item", 0.1),
    "export": ("dist_ft.export.account:Fingerprint.of", 1),
}
SAID = {
    "preparation": "the cache",
    "loading": "no step was trained since this start",
    "step": "is saved in a checkpoint",
    "evaluation": "is saved in a checkpoint",
    "save": "is saved",  # the save in the background may be the last one by then
    "export": "training is complete and step 6 is saved",
}
WHO = ("command", "launcher", "rank-0", "rank-1")
DICE = random.Random(13)
CASES = [
    (
        phase,
        engine,
        "command" if phase == "preparation" else DICE.choice(WHO),
        DICE.choice(["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]),
    )
    for phase, engine in zip(SLOW, ["ddp", "zero2", "fsdp", "zero2", "ddp", "fsdp"], strict=True)
]


def outcome(run_dir: Path) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]
    return (run_dir / "model" / "adapter_model.safetensors").read_bytes(), kept


def finish(job: Any) -> str:
    output: str = job.process.communicate(timeout=120)[0]
    assert job.process.returncode == 0, output
    return output


KNOWN: dict[str, tuple[bytes, list[dict[str, Any]]]] = {}


@pytest.fixture
def whole(start: Callable, tmp_path: Path) -> Callable[[str], tuple[bytes, list[dict[str, Any]]]]:
    """Return what an uninterrupted run of an engine leaves; each is trained once."""

    def train(engine: str) -> tuple[bytes, list[dict[str, Any]]]:
        if engine not in KNOWN:
            validation = f"data.validation={tmp_path / 'rows.jsonl'}"
            finish(start("", engine, *WORDS, validation, f"output_dir={tmp_path / 'whole'}"))
            KNOWN[engine] = outcome(tmp_path / "whole")
        return KNOWN[engine]

    return train


@pytest.mark.parametrize(("phase", "engine", "who", "name"), CASES)
def test_a_signal_in_any_phase_loses_no_step(
    phase: str, engine: str, who: str, name: str, start: Callable, whole: Callable, tmp_path: Path
) -> None:
    words = [*WORDS, f"data.validation={tmp_path / 'rows.jsonl'}", f"track.report={str(phase == 'step').lower()}"]
    function, seconds = SLOW[phase]
    job = start("", engine, *words, slow=f"{function}:{seconds}")
    job.wait_for_call(function.split(":")[1], calls={"step": 5, "evaluation": 3}.get(phase, 1))
    job.target(who).send_signal(getattr(signal, name))
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 75, output
    assert f"{name}: " in output and SAID[phase] in output and "run the same command again" in output, output
    job.assert_gone(time.time())
    assert "exit_code" not in output and "Traceback" not in output
    assert phase != "step" or status_in_report(job.run_dir) == "stopped"
    finish(start("", engine, *words))
    assert phase != "step" or status_in_report(job.run_dir) == "finished"
    weights, lines = outcome(job.run_dir)
    wanted, wanted_lines = whole(engine)
    assert lines == wanted_lines
    assert weights == wanted


def test_a_second_signal_ends_a_run_at_once(start: Callable) -> None:
    job = start("", "ddp", "train.save_steps=4", slow="torch.distributed.checkpoint.filesystem:_write_item:30")
    job.wait_for_call("_write_item")
    job.process.send_signal(signal.SIGINT)
    time.sleep(1)
    since = time.time()
    job.process.send_signal(signal.SIGINT)
    output, _ = job.process.communicate(timeout=20)
    assert job.process.returncode == 130, output
    assert "a second signal ended the run at once: what was trained since the start is lost" in output
    job.assert_gone(since)


def test_two_starts_in_one_folder_have_one_owner(start: Callable) -> None:
    first = start("none:0:3", "ddp", "train.max_steps=60", slow="dist_ft.loop:train_step:0.1")
    first.wait_for_fault()
    second = start("", "ddp", "train.max_steps=60")
    output, _ = second.process.communicate(timeout=60)
    assert second.process.returncode == 2, output
    assert f"{first.run_dir}: is in use by another start of this run" in output
    finish(first)
    lines = [json.loads(line)["step"] for line in (first.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))


def test_checkpoints_of_another_branch_are_moved_aside(start: Callable, tmp_path: Path) -> None:
    """Resumed from step 2 under another schedule and stopped, the run goes on with its own steps."""
    finish(start("", "ddp", "train.save_steps=2", "train.max_steps=12"))
    checkpoints = tmp_path / "run" / "checkpoints"
    words = ["train.save_steps=2", "train.max_steps=8"]
    job = start("", "ddp", *words, f"train.resume={checkpoints / 'step-2'}", slow="dist_ft.loop:train_step:0.3")
    job.wait_for_call("train_step", calls=6)
    job.process.send_signal(signal.SIGTERM)
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 75 and "train.resume=auto to go on" in output, output
    assert f"moved to {checkpoints / 'stale-1' / 'step-12'}" in output
    finish(start("", "ddp", *words))
    got = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    branch = start("", "ddp", *words, f"train.resume={checkpoints / 'step-2'}", f"output_dir={tmp_path / 'branch'}")
    finish(branch)
    wanted = [json.loads(line) for line in (tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()]
    assert [m["train/loss"] for m in got if m["step"] > 2] == [m["train/loss"] for m in wanted]
    own, other = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "branch"))
    assert own.read_bytes() == other.read_bytes()
