"""Process groups for multi-process tests.

Importing the libraries takes seconds and a test case takes milliseconds, so a test module should spawn one process
group and pass it all of its test cases.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STARTED_AS = "dist_ft.testing.spawn"


def spawn(world_size: int, function: str, payload: Any, *, timeout_s: float = 300) -> list[Any]:
    """Call `function(place, payload)` in `world_size` processes that form a process group.

    Args:
        world_size: Number of processes.
        function: Function to call, as `module:name`; must be importable from the current directory.
        payload: JSON-serializable argument of the function.
        timeout_s: Time in seconds after which all processes are killed.

    Returns:
        The JSON-serializable return values of the processes, in rank order.

    Raises:
        RuntimeError: If a process fails or times out; the message holds the last output of every process.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "payload.json"
        given.write_text(json.dumps(payload))
        port = _free_port()
        workers = [_start(rank, world_size, function, given, port) for rank in range(world_size)]
        return _collect(workers, Path(folder), timeout_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(rank: int, world_size: int, function: str, payload: Path, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", STARTED_AS, function, str(payload)]
    output = (payload.parent / f"rank-{rank}.log").open("wb")
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _collect(workers: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> list[Any]:
    try:
        codes: list[int | None] = [worker.wait(timeout_s) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(codes) or None in codes:
        logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in sorted(folder.glob("*.log"))]
        raise RuntimeError(f"exit codes {codes}\n" + "\n".join(logs))
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(len(workers))]


def _main(function: str, payload: str) -> None:
    import torch

    from ..process import comm
    from ..process.place import find_place

    sys.path.insert(0, os.getcwd())
    place = find_place()
    comm.join(place, comm.open_store(place, 60), torch.device("cpu"), 120)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(place, json.loads(Path(payload).read_text()))
    (Path(payload).parent / f"result-{place.rank}.json").write_text(json.dumps(result))
    comm.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
