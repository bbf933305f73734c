"""Inject a fault into a worker from outside, so that the package contains no code for it.

DIST_FT_FAULT=KIND:RANK:STEP makes rank RANK fail before step STEP. KIND is `raise`, `kill` (SIGKILL), `stop`
(SIGSTOP), `hang`, or `memory` (out of memory).
"""

import importlib.machinery
import os
import pathlib
import signal
import sys
import time


def inject(loop):
    kind, rank, step = os.environ["DIST_FT_FAULT"].split(":")
    train_step = loop.train_step

    def faulty(run, at):
        if at == int(step) and run.rank == int(rank):
            pathlib.Path(os.environ["DIST_FT_FAULT_MARK"]).write_text(f"{os.getpid()} {time.time()}")
            if kind == "raise":
                raise ValueError("injected fault")
            if kind == "memory":
                raise MemoryError("out of memory: injected")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "hang":
                time.sleep(3600)
        return train_step(run, at)

    loop.train_step = faulty


class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != "dist_ft.loop":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            inject(module)

        spec.loader.exec_module = exec_module
        return spec


if "DIST_FT_FAULT" in os.environ:
    sys.meta_path.insert(0, Finder)
