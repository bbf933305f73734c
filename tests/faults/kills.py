"""Seeded kills of ranks, many in a minute: `python -m tests.faults.kills PAYLOAD` prints what came out of them.

One process imports everything and forks the ranks of each run, so that a run of a tiny model takes a second. A rank
kills itself (SIGKILL) at an event that the seed chooses: a step, the copy of a save, each piece written, each fsync,
rename, link and deletion. The other ranks are killed a random time later, as a launcher would; then the run is started
again. What is left is compared with an uninterrupted run: files of weights and moments, and the lines of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_ft import loop
from dist_ft.checkpoint import files, host
from dist_ft.process import comm
from dist_ft.process.place import find_place
from tests.dist.cases import run_case

LIMIT_S = 120  # of one run
HARDLY_S = 0.05  # within which the other ranks are killed
MOST_KILLS = 3  # of one run


def events() -> Iterator[tuple[Any, str]]:
    """What a rank may be killed before: functions by their holder and name."""
    yield loop, "train_step"
    yield host.HostCopies, "fill"
    yield files._HashedFile, "_write_piece"
    yield os, "fsync"
    yield from ((Path, name) for name in ("rename", "replace", "symlink_to"))
    yield shutil, "rmtree"


def count_events(log: Path, at: int | None) -> None:
    """Log each event, and kill this process before event number `at`."""
    seen = 0

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            with log.open("a") as file:
                file.write(f"{name}\n")
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return count

    for holder, name in events():
        setattr(holder, name, counted(getattr(holder, name), name))


def start_rank(rank: int, world: int, port: int, config: dict[str, Any], log: Path, at: int | None) -> int:
    """Fork a rank; return its process id."""
    if child := os.fork():
        return child
    with contextlib.suppress(BaseException), (log.with_suffix(".out")).open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"})
        try:
            place = find_place()
            comm.join(place, comm.open_store(place, 60), torch.device("cpu"), 60)
            count_events(log, at)
            run_case(place, {"config": config})
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
    os._exit(1)


def run(world: int, config: dict[str, Any], folder: Path, kill: tuple[int, int, float] | None) -> str:
    """Start the ranks and wait; with `kill`, rank, event and delay of the others' end. Return how it ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(world):
        (folder / f"rank-{rank}.log").unlink(missing_ok=True)
    at = {kill[0]: kill[1]} if kill else {}
    left = {start_rank(r, world, port, config, folder / f"rank-{r}.log", at.get(r)) for r in range(world)}
    ended, deadline = "whole", time.monotonic() + LIMIT_S
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in left:
            left.discard(child)
            if status and ended == "whole":
                ended = "killed" if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else "failed"
                time.sleep(kill[2] if kill else 0)
                for other in left:
                    os.kill(other, signal.SIGKILL)
        elif time.monotonic() > deadline:
            for other in left:
                os.kill(other, signal.SIGKILL)
            deadline, ended = time.monotonic() + 10, "hung"
        else:
            time.sleep(0.01)
    return ended


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a run leaves: the bytes of its last checkpoint's tensors, and its metrics without times."""
    last = (run_dir / "checkpoints" / "latest").resolve()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]
    return {"step": last.name, "lines": kept, **{path.name: path.read_bytes() for path in last.glob("*.distcp")}}


def campaign(folder: Path, jobs: dict[str, dict[str, Any]], world: int, kills: int, seed: int) -> dict[str, Any]:
    """Kill the jobs in turn until there were `kills`; return how many there were of each kind, and what differs."""
    dice, begun = random.Random(seed), time.monotonic()
    found: dict[str, Any] = {"kills": 0, "in_a_save": 0, "runs": 0, "by_event": {}, "differing": [], "bad": []}
    wanted: dict[str, tuple[dict[str, Any], list[list[str]]]] = {}
    names = list(jobs)
    while found["kills"] < kills:
        name = names[found["runs"] % len(names)]
        config, run_dir = jobs[name], Path(jobs[name]["output_dir"])
        if name not in wanted:
            assert run(world, config, folder, None) == "whole", (folder / "rank-0.out").read_text()[-3000:]
            logs = [(folder / f"rank-{rank}.log").read_text().splitlines() for rank in range(world)]
            wanted[name] = (outcome(run_dir), logs)
        shutil.rmtree(run_dir)
        found["runs"] += 1
        told: list[Any] = []
        for _ in range(dice.randint(1, MOST_KILLS)):
            rank = dice.randrange(world)
            log = wanted[name][1][rank]
            kind = dice.choice(sorted(set(log)))  # pieces of files are far more than steps and renames
            at = dice.choice([number for number, event in enumerate(log, start=1) if event == kind])
            ended = run(world, config, folder, (rank, at, HARDLY_S * dice.random()))
            log = (folder / f"rank-{rank}.log").read_text().splitlines()
            event = log[-1] if log else "start"
            told.append([rank, at, event, ended])
            if ended == "killed":
                found["kills"] += 1
                found["in_a_save"] += event != "train_step"
                found["by_event"][event] = found["by_event"].get(event, 0) + 1
            elif ended != "whole":
                found["bad"].append([name, told, (folder / f"rank-{rank}.out").read_text()[-1500:]])
        if (ended := run(world, config, folder, None)) != "whole":
            found["bad"].append([name, told, ended, (folder / "rank-0.out").read_text()[-1500:]])
        elif outcome(run_dir) != wanted[name][0]:
            found["differing"].append([name, told])
        print(json.dumps(found), file=sys.stderr, flush=True)
    return {**found, "seconds": round(time.monotonic() - begun)}


def main(payload: str) -> None:
    given = json.loads(Path(payload).read_text())
    sys.path.insert(0, os.getcwd())
    import deepspeed  # noqa: F401  # imported once, before the ranks are forked

    folder = Path(given["folder"])
    print(json.dumps(campaign(folder, given["jobs"], given["world"], given["kills"], given["seed"])))


if __name__ == "__main__":
    main(sys.argv[1])
