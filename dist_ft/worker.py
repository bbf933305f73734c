"""One worker: `python -m dist_ft.worker RUN_YAML`, under torchrun, deepspeed, srun, or alone."""

from __future__ import annotations

from .process.pulse import Pulse
from .process.stop import Stop

STOP, PULSE = Stop(), Pulse()
if __name__ == "__main__":  # before torch is imported, which takes seconds
    PULSE.fork_monitor()
    STOP.listen()

import contextlib
import faulthandler
import math
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .config.plan import REPORT_FILE, STOP_FILE, Plan, read_plan
from .errors import DistFtError, MachineError, RequestError, Stopped
from .process.failure import STOPPED_S, forget, report
from .process.monitor import About
from .process.owner import own
from .process.place import Place, Worker, find_device, find_place, time_limit

if TYPE_CHECKING:
    from .protocols import Tracker

LATER_S = 10.0  # than the monitor of a rank that hangs before the rendezvous, which names it, the others give up


def main(arguments: list[str]) -> int:
    """Run the plan at `arguments[0]`; further arguments of launchers (`--local_rank=N`) are ignored.

    Returns:
        The exit code: 0, or that of the error.
    """
    started = time.time()
    try:
        if not arguments:
            raise RequestError.of("RUN_YAML", "is missing", "python -m dist_ft.worker runs/NAME/run.yaml")
        plan, place = read_plan(arguments[0]), find_place()
        if place.world_size != plan.world_size:
            rule = f"{place.world_size} workers were started, but the plan is for {plan.world_size}"
            raise MachineError.of(str(plan.run_file), rule, "start as many, or change launch.workers_per_node")
        if place.is_main:
            own(plan.run_dir)
    except DistFtError as error:
        print(f"dist-ft: {error.title}\n{error}", file=sys.stderr)
        return error.exit_code
    terminal = open_log(plan.run_dir, place)
    forget(plan.run_dir, started)
    patience_s = STOPPED_S if place.world_size > 1 else 0.0
    STOP.attach(
        partial(report, place=place, run_dir=plan.run_dir, terminal=terminal, patience_s=patience_s),
        partial(find_request, plan.run_dir / STOP_FILE, time_to_stop(plan, started)) if place.is_main else lambda: None,
    )
    PULSE.start(About.of(plan, place, PULSE.launcher))
    try:
        train(plan, place, terminal)
    except BaseException as error:  # a rank that ends must end the run with an exit code
        code = report(error, place=place, run_dir=plan.run_dir, terminal=terminal)
        finish_report(plan, place, terminal)
        return code
    return 0


def finish_report(plan: Plan, place: Place, terminal: TextIO) -> None:
    """Write report.html for the last time; an error is shown and changes nothing."""
    from .track.report import write_last

    if place.is_main and plan.config.track.report and (reason := write_last(plan.run_dir)):
        print(f"dist-ft: {REPORT_FILE} was not written: {reason}", file=terminal, flush=True)


def leave_out_bitsandbytes(plan: Plan, model_dir: Path) -> None:
    """Let peft find no bitsandbytes in this process if neither the run nor the files of its model are quantized.

    peft imports it where it is installed, and it imports torch's compiler: a second of processor time on each rank.
    """
    from .pretrained.folder import stored_scheme

    if plan.config.model.quantization in (None, "none") and stored_scheme(model_dir) is None:
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # "not found", see the import system


def close_tracker(tracker: Tracker, _kind: object, error: BaseException | None, _trace: object) -> None:
    """Close the tracker of a run when it is left, with the error that ended it, as `ExitStack.push` calls it."""
    tracker.close(error)


def time_to_stop(plan: Plan, started: float) -> float:
    """Return the Unix time at which to stop because of the time limit of the job; infinity without one."""
    end = time_limit()
    return math.inf if end is None else end - plan.config.train.seconds_before(end - started)


def find_request(file: Path, stop_at: float) -> str | None:
    """Return the cause of a request that is not a signal: the time limit, or the content of a launcher's stop file."""
    if time.time() >= stop_at:
        return "time limit of the job"
    with contextlib.suppress(OSError):
        cause = file.read_text(encoding="utf-8")
        file.unlink()
        return cause
    return None


def open_log(run_dir: Path, place: Place) -> TextIO:
    """Redirect this process's output to logs/rank-<r>.log.

    Returns:
        The terminal: the standard error that the process was started with.
    """
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank-{place.rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for descriptor in (1, 2):  # C libraries write to the descriptors
        os.dup2(log, descriptor)
    os.close(log)
    faulthandler.enable()  # a crash in C code leaves its stack in the log
    # These warnings concern this package, not the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    return terminal


def train(plan: Plan, place: Place, terminal: TextIO) -> None:
    """Prepare the data, join the other ranks, build the run, train and export."""
    from .process import lifeline

    begun = time.monotonic()
    lifeline.hold(PULSE.leave)
    PULSE.beat("the import of libraries")
    from .prepare import prepare_plan

    PULSE.beat("the preparation of data and model")
    prepared = prepare_plan(plan)  # before the process group exists, so that no collective times out on it
    leave_out_bitsandbytes(plan, Path(prepared.model_dir))
    from .build import build
    from .loop import fit
    from .process import comm
    from .process.watchdog import Watchdog
    from .track.messages import summarize

    PULSE.beat("the rendezvous with other ranks")
    timeout_s = plan.config.train.timeout_s
    device = find_device(place)
    store = comm.open_store(place, timeout_s + LATER_S)
    comm.join(place, store, device)
    watchdog = Watchdog(place, PULSE, comm.connect_again(store, timeout_s), timeout_s, plan.run_dir, terminal)
    watchdog.start()
    stopped: Stopped | None = None
    with contextlib.ExitStack() as unwatched, contextlib.closing(watchdog):
        worker = Worker(place, device, terminal, PULSE.beat, PULSE.tick, STOP)
        run = build(plan, prepared, worker)
        unwatched.push(partial(close_tracker, run.records.tracker))  # an upload has a time limit of its own
        try:
            fit(run)
            PULSE.beat("export")
            run.records.export()
            for line in summarize(plan, run.progress, time.monotonic() - begun):
                worker.say(line)
        except Stopped as error:
            stopped = error
        comm.barrier()
    if stopped is None:
        finish_report(plan, place, terminal)
    comm.barrier()  # launchers and schedulers end a run soon after its first worker has ended
    comm.leave()
    if stopped is not None:
        raise stopped


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    PULSE.leave()
    # Threads of communication libraries sometimes abort an interpreter that exits normally.
    os._exit(code)
