"""Inject a fault into a worker from outside, so that the package contains no code for it.

DIST_FT_FAULT=KIND:RANK:WHEN makes rank RANK fail before step WHEN, or when it has imported a module of that name. KIND
is `raise`, `kill` (SIGKILL), `crash` (SIGSEGV), `exit` (os._exit), `stop` (SIGSTOP), `hang`, `lock` (hang with Python's
lock held), or `memory` (out of memory). It fails once, and no more when the run is started again.

DIST_FT_SLOW=MODULE:FUNCTION:SECONDS[:RANK],... delays each call of these functions, on one rank or on all; FUNCTION may
be CLASS.METHOD.
"""

import ctypes
import functools
import importlib.machinery
import os
import pathlib
import signal
import sys
import time

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "crash": signal.SIGSEGV}


def fail(kind):
    mark = pathlib.Path(os.environ["DIST_FT_FAULT_MARK"])
    if mark.exists():
        return
    mark.write_text(f"{os.getpid()} {time.time()}")
    if kind == "raise":
        raise ValueError("injected fault")
    if kind == "memory":
        raise MemoryError("out of memory: injected")
    if kind == "hang":
        time.sleep(3600)
    if kind == "lock":
        ctypes.PyDLL(None).sleep(3600)
    if kind == "exit":
        os._exit(0)
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])


def fail_at_step(loop, kind, rank, step):
    train_step = loop.train_step

    def faulty(run, at):
        if at == step and run.rank == rank:
            fail(kind)
        return train_step(run, at)

    loop.train_step = faulty


def fail_at_import(module, kind, rank):
    if os.environ.get("RANK") == str(rank):
        fail(kind)


def delay(module, name, seconds):
    holder = module
    *outer, last = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    call = vars(holder)[last]
    plain = call.__func__ if isinstance(call, classmethod) else call

    @functools.wraps(plain)
    def slow(*arguments, **options):
        with pathlib.Path(os.environ["DIST_FT_FAULT_MARK"] + ".slow").open("a") as file:
            file.write(f"{name} {os.environ.get('RANK', 'command')}\n")
        time.sleep(seconds)
        return plain(*arguments, **options)

    setattr(holder, last, classmethod(slow) if isinstance(call, classmethod) else slow)


def faults():
    """Return what to do with a module once it is imported, by its name."""
    found = {}
    if "DIST_FT_FAULT" in os.environ:
        kind, rank, when = os.environ["DIST_FT_FAULT"].split(":")
        if when.isdigit():
            found["dist_ft.loop"] = [functools.partial(fail_at_step, kind=kind, rank=int(rank), step=int(when))]
        else:
            found[when] = [functools.partial(fail_at_import, kind=kind, rank=int(rank))]
    for entry in filter(None, os.environ.get("DIST_FT_SLOW", "").split(",")):
        module, name, seconds, *rank = entry.split(":")
        if rank and rank != [os.environ.get("RANK")]:
            continue
        found.setdefault(module, []).append(functools.partial(delay, name=name, seconds=float(seconds)))
    return found


class Finder:
    faults = faults()

    @classmethod
    def find_spec(cls, name, path, target=None):
        if name not in cls.faults:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for fault in cls.faults[name]:
                fault(module)

        spec.loader.exec_module = exec_module
        return spec


if Finder.faults:
    sys.meta_path.insert(0, Finder)
