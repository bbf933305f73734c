"""Process groups for multi-process tests.

Importing the libraries takes seconds and a test case takes milliseconds. A fork server of `multiprocessing` therefore
imports them once and forks each worker, and a test module should spawn one process group and pass it all of its test
cases.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

# What most workers import. Nothing in it starts threads, so that it may be forked.
PRELOADED = [
    "dist_ft.build",
    "dist_ft.engine.deepspeed",
    "dist_ft.engine.fsdp",
    "dist_ft.loop",
    "dist_ft.prepare",
    "dist_ft.method.lora",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
]


def spawn(world_size: int, function: str, payload: Any, *, timeout_s: float = 300, fresh: bool = False) -> list[Any]:
    """Call `function(place, payload)` in `world_size` processes that form a process group.

    Args:
        world_size: Number of processes.
        function: Function to call, as `module:name`; must be importable from the current directory.
        payload: JSON-serializable argument of the function.
        timeout_s: Time in seconds after which all processes are killed.
        fresh: Start new interpreters instead of forks of the fork server, because the C library or an import must see
            the current environment.

    Returns:
        The JSON-serializable return values of the processes, in rank order.

    Raises:
        RuntimeError: If a process fails or times out; the message holds the last output of every process.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "payload.json"
        given.write_text(json.dumps(payload))
        port = _free_port()
        workers = [_start(rank, world_size, function, given, port, fresh=fresh) for rank in range(world_size)]
        return _collect(workers, Path(folder), timeout_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(rank: int, world_size: int, function: str, payload: Path, port: int, *, fresh: bool) -> BaseProcess:
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
    context: Any
    if fresh:
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    arguments = (environment, os.getcwd(), function, payload, payload.parent / f"rank-{rank}.log")
    worker: BaseProcess = context.Process(target=_work, args=arguments)
    with mock.patch.dict(os.environ, environment):  # of a new interpreter, and of the fork server
        worker.start()
    return worker


def _collect(workers: list[BaseProcess], folder: Path, timeout_s: float) -> list[Any]:
    until = time.monotonic() + timeout_s
    try:
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
        codes = [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    if any(codes) or None in codes:
        logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in sorted(folder.glob("*.log"))]
        raise RuntimeError(f"exit codes {codes}\n" + "\n".join(logs))
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(len(workers))]


def _work(environment: dict[str, str], cwd: str, function: str, payload: Path, log: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)

    import torch

    from ..process import comm
    from ..process.place import find_place

    sys.path.insert(0, cwd)
    place = find_place()
    comm.join(place, comm.open_store(place, 60), torch.device("cpu"), 120)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(place, json.loads(payload.read_text()))
    (payload.parent / f"result-{place.rank}.json").write_text(json.dumps(result))
    comm.barrier()
