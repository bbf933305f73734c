"""Tests of failures: when one rank fails, all end promptly, with one report, one exit code and no process left."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.reports import status_in_report

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]
DEADLINE_S = 5


@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_a_rank_that_raises_stops_all(start, engine: str) -> None:
    job = start("raise:1:3", engine, "track.report=true")
    since = job.wait_for_fault()
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 4, output
    job.assert_gone(since)
    assert output.count("injected fault") == 1, output
    assert "rank 1 of 2" in output and "rank-1.log" in output
    record = json.loads((job.run_dir / "failure.json").read_text())
    assert (record["rank"], record["exit_code"]) == (1, 4)
    assert "ValueError: injected fault" in (job.run_dir / "logs" / "rank-1.log").read_text()
    assert status_in_report(job.run_dir) == "failed"
    assert "ValueError: injected fault" in (job.run_dir / "report.html").read_text()


def test_out_of_memory_names_the_ways_out(start) -> None:
    job = start("memory:0:2")
    output, _ = job.process.communicate(timeout=120)
    assert job.process.returncode == 4 and "gradient_checkpointing" in output


@pytest.mark.parametrize(
    ("fault", "engine", "words"),
    [
        ("kill:1:3", "ddp", ["was killed by SIGKILL", "check memory use and dmesg"]),
        ("crash:0:3", "zero1", ["was killed by SIGSEGV", "Fatal Python error: Segmentation fault", "sitecustomize.py"]),
        ("exit:1:3", "fsdp", ["left with exit code 0 at step 2"]),
        ("kill:1:dist_ft.prepare", "ddp", ["was killed by SIGKILL at the import of libraries"]),
    ],
)
def test_a_rank_that_dies_is_named_before_its_neighbours_connection(start, fault: str, engine: str, words) -> None:
    job = start(fault, engine)
    since = job.wait_for_fault()
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 4, output
    job.assert_gone(since)
    rank = int(fault.split(":")[1])
    record = json.loads((job.run_dir / "failure.json").read_text())
    assert (record["rank"], record["exit_code"]) == (rank, 4)
    assert output.count("dist-ft: training failed") == 1 and record["report"] in output
    assert all(word in output for word in (f"rank {rank} on ", *words)), output


@pytest.mark.parametrize(("fault", "engine"), [("kill:0:4", "ddp"), ("hang:1:4", "zero1")])
def test_workers_start_again_from_the_newest_checkpoint(start, fault: str, engine: str) -> None:
    words = ["train.restarts=2", f"train.timeout_s={DEADLINE_S}"]
    words += ["train.save_steps=2", "train.max_steps=6", "train.async_save=false"]
    job = start(fault, engine, *words)
    output, _ = job.process.communicate(timeout=120)
    assert job.process.returncode == 0, output
    assert "restart 1 of 2 (train.restarts), from step 2" in output and "restart 2" not in output, output
    assert output.count("dist-ft: training failed") == 1 and not (job.run_dir / "failure.json").exists()
    lines = (job.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (job.run_dir / "model" / "config.json").exists()
    job.assert_gone(time.time())


@pytest.mark.parametrize(
    ("fault", "engine", "words"),
    [
        ("hang:1:3", "ddp", ["no progress", "at step 2, micro-batch 1 of 1", "sitecustomize.py"]),
        ("stop:1:3", "fsdp", ["no heartbeat", "at step 2, micro-batch 1 of 1"]),
        ("stop:0:3", "zero2", ["no heartbeat", "at step 2, micro-batch 1 of 1"]),
        ("lock:0:3", "ddp", ["no heartbeat", "at step 2, micro-batch 1 of 1"]),  # the stack is of the last heartbeat
        ("stop:0:torch", "ddp", ["no heartbeat", "at the preparation of data and model"]),
        ("hang:0:dist_ft.build", "zero1", ["no progress", "sitecustomize.py"]),
        ("stop:1:dist_ft.config.plan", "ddp", ["no heartbeat", "at start"]),
    ],
)
def test_a_rank_that_stops_answering_is_named_in_time(start, fault: str, engine: str, words) -> None:
    job = start(fault, engine, f"train.timeout_s={DEADLINE_S}")
    since = job.wait_for_fault()
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 4, output
    rank = int(fault.split(":")[1])
    record = json.loads((job.run_dir / "failure.json").read_text())
    assert all(word in output for word in (f"rank {rank} on ", *words)), output
    assert record["rank"] == rank and f"rank {1 - rank} on " not in output
    assert record["time"] - since < DEADLINE_S + 5
    job.assert_gone(record["time"])


def test_a_slow_rank_is_named_and_waited_for(start) -> None:
    job = start("", "ddp", "train.max_steps=22", slow="dist_ft.data.order.loader:Loader.step:0.2:1")
    output, _ = job.process.communicate(timeout=100)
    assert job.process.returncode == 0, output
    named = [line for line in output.splitlines() if "is slow: loading data took" in line]
    assert len(named) == 1 and named[0].startswith("dist-ft: rank 1 on "), output
    last = json.loads((job.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["perf/slowest_rank_ratio"] > 1.5 and last["perf/load_time_s"] > 0.2


SLOW_S = 0.5  # for each tensor, of which the model has 20 and a checkpoint 60: far longer than the watchdog waits
LOAD = "transformers.core_model_loading:set_param_for_module"
SAVE = "torch.distributed.checkpoint.filesystem:_write_item"
READ = "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.resolve_tensor"
SHARD = "dist_ft.engine.fsdp:_scatter"
EXPORT = "dist_ft.export.account:Fingerprint.of"


def test_slow_work_longer_than_the_timeout_is_no_hang(start) -> None:
    """Loading, sharding, saving, resuming and exporting, each on one rank for longer than `train.timeout_s`."""
    phases = {(LOAD, 0): 10, (SHARD, 0): 10, (SHARD, 1): 10, (SAVE, 0): 10, (SAVE, 1): 10, (EXPORT, 0): 20}
    resumed = {(READ, 0): 20, (READ, 1): 20}
    for words, slow in ((["train.max_steps=2"], phases), (["train.max_steps=3"], resumed)):
        places = ",".join(f"{place}:{SLOW_S}" for place in dict.fromkeys(place for place, _ in slow))
        job = start("", "fsdp", "train.timeout_s=4", *words, slow=places)
        output, _ = job.process.communicate(timeout=200)
        assert job.process.returncode == 0, output
        assert (job.run_dir / "model" / "config.json").exists()
        log = Path(f"{job.mark}.slow")
        calls = Counter(log.read_text().splitlines())
        log.unlink()
        for (place, rank), least in slow.items():
            assert calls[f"{place.split(':')[1]} {rank}"] >= least, (place, rank, calls)


def test_a_hang_of_the_export_is_found_on_rank_0(start) -> None:
    job = start("", "ddp", "train.timeout_s=4", "train.max_steps=1", slow=f"{EXPORT}:3600")
    output, _ = job.process.communicate(timeout=100)
    assert job.process.returncode == 4, output
    assert "no progress" in output and "rank 0 on" in output and "rank 1 on" not in output, output
    assert "sitecustomize.py" in output


@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_kill_9_of_the_command_leaves_nothing(start, engine: str) -> None:
    job = start("none:0:3", engine)
    since = job.wait_for_fault()
    assert len(job.members()) >= 4
    job.process.kill()
    job.assert_gone(max(since, time.time()))
    record = job.run_dir / "failure.json"
    assert not record.exists() or json.loads(record.read_text())["exit_code"] == 75, "no rank has failed"


@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_kill_9_of_the_launcher_leaves_nothing(start, engine: str) -> None:
    job = start("none:0:3", engine)
    job.wait_for_fault()
    launcher = psutil.Process(job.process.pid).children()[0]
    launcher.kill()
    job.process.communicate(timeout=30)
    assert job.process.returncode not in (0, None)
    job.assert_gone(time.time())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_ends_all(start, number: int) -> None:
    job = start("none:0:3")
    job.wait_for_fault()
    job.process.send_signal(number)
    job.process.communicate(timeout=30)
    assert job.process.returncode not in (0, None)
    job.assert_gone(time.time())
