"""A `dist-ft train` process, with faults from outside the package (see inject/sitecustomize.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

INJECT = Path(__file__).parent / "inject"
LIMIT_S = 10  # from the fault until the last process has ended


class Job:
    """A `dist-ft train` process with an injected fault, or with slow functions (see inject/sitecustomize.py)."""

    def __init__(self, folder: Path, fault: str, words: list[str], slow: str = "") -> None:
        self.folder, self.mark = folder, folder / "mark"
        self.run_dir = folder / "run"
        environment = {
            **os.environ,
            "PYTHONPATH": str(INJECT),
            "DIST_FT_SLOW": slow,
            **({"DIST_FT_FAULT": fault} if fault else {}),
            "DIST_FT_FAULT_MARK": str(self.mark),
            "DIST_FT_TEST_JOB": str(folder),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.launch.cli", "train", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_fault(self) -> float:
        """Wait for the fault and return its time."""
        deadline = time.time() + 120
        while not self.mark.exists() or not self.mark.read_text():
            assert self.process.poll() is None and time.time() < deadline, self.output()
            time.sleep(0.05)
        return float(self.mark.read_text().split()[1])

    def wait_for_call(self, name: str, calls: int = 1) -> None:
        """Wait until a slow function was called so often, by rank 0 or before there are ranks."""
        log, deadline = Path(f"{self.mark}.slow"), time.time() + 120
        while not log.exists() or sum(line.split()[0] == name for line in log.read_text().splitlines()) < calls:
            assert self.process.poll() is None and time.time() < deadline, self.output()
            time.sleep(0.02)

    def target(self, who: str) -> psutil.Process:
        """Return the process of the command, of its launcher, or of rank N (`rank-N`)."""
        command = psutil.Process(self.process.pid)
        if who == "command":
            return command
        if who == "launcher":
            return command.children()[0]
        workers = [p for p in command.children(recursive=True) if "dist_ft.worker" in p.cmdline()]
        return next(p for p in workers if p.environ().get("RANK", "0") == who.removeprefix("rank-"))

    def output(self) -> str:
        self.process.kill()
        return self.process.communicate()[0]

    def members(self) -> list[psutil.Process]:
        """Return all descendants of the command including orphans, identified by an environment variable."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DIST_FT_TEST_JOB") == str(self.folder) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_gone(self, since: float) -> None:
        while left := self.members():
            assert time.time() - since < LIMIT_S, [process.cmdline() for process in left]
            time.sleep(0.1)
