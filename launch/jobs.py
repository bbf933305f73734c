"""`dist-ft status`, `logs` and `cancel`: runs of this machine, of hosts over ssh and of SLURM, by their folders.

What runs is found, not remembered: the command that trains holds a lock on the run's folder (dist_ft/process/owner.py),
which ends with it, and SLURM is asked for its jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..config.plan import (
    CHECKPOINTS,
    EXIT_FILE,
    FAILURE_FILE,
    JOB_FILE,
    LOG_DIR,
    METRICS_FILE,
    RUN_FILE,
    STOP_FILE,
    Plan,
    read_plan,
    saved_steps,
)
from ..errors import DistFtError, RequestError, Stopped
from ..process.options import CancelOptions, LogsOptions, StatusOptions, read_words
from ..process.owner import find_owner
from ..process.stop import REPEAT_S
from ..report.folder import read_object
from .slurm.queue import QUEUED, cancel_job, find_job

CAUSE = "dist-ft cancel"
POLL_S = 0.5
ENDING_S = 15.0  # from a second signal until a command is killed
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    folder: Path
    state: str  # planned, queued, running, finished, stopped, failed, ended (killed, without a report) or unknown
    where: str  # the job, or the process of the command; empty if it does not run
    step: int
    total: str
    loss: float | None
    updated: float | None  # Unix time of the last step
    code: int | None

    @property
    def is_active(self) -> bool:
        """Whether the run is queued or runs."""
        return self.state in ("queued", "running")


def run_jobs_command(command: str, words: Sequence[str]) -> int:
    """Run `status`, `logs` or `cancel` and return its exit code."""
    if command == "status":
        return show_status(read_words(StatusOptions, words))
    if command == "logs":
        return show_logs(read_words(LogsOptions, words))
    return cancel(read_words(CancelOptions, words))


def keep_exit(run_dir: Path, start: Callable[[], int]) -> int:
    """Run a command that trains in a folder, and keep its exit code there for `dist-ft status`."""
    for name in (EXIT_FILE, JOB_FILE):
        (run_dir / name).unlink(missing_ok=True)
    code: int | None = None
    try:
        code = start()
        return code
    except DistFtError as error:
        code = error.exit_code
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk
            if code is not None:
                (run_dir / EXIT_FILE).write_text(f"{code}\n", encoding="utf-8")


def find_status(run_dir: Path) -> Status:
    """Find out how a run stands."""
    plan = read_plan(run_dir)
    last = _last_step(run_dir)
    train = plan.config.train
    total = f" of {train.max_steps}" if train.max_steps else f", epoch {last.get('epoch', 0):.2f}"
    total += "" if train.max_steps else f" of {train.num_train_epochs:g}"
    code = _number(run_dir / EXIT_FILE)
    code = read_object(run_dir / FAILURE_FILE).get("exit_code") if code is None else code
    state, where = _find_state(plan, run_dir, code)
    updated = (run_dir / METRICS_FILE).stat().st_mtime if last else None
    code = None if state in ("queued", "running") else code
    return Status(run_dir, state, where, last.get("step", 0), total, last.get("train/loss"), updated, code)


def _find_state(plan: Plan, run_dir: Path, code: int | None) -> tuple[str, str]:
    identity = read_object(run_dir / JOB_FILE).get("job") if plan.config.launch.name == "slurm" else None
    job = find_job(identity) if identity else None
    where = f"job {identity}, {job.said if job else 'of which SLURM says nothing here'}" if identity else ""
    if job is not None and job.is_active:
        return "queued" if job.state in QUEUED else "running", where
    if job is None and (owner := find_owner(run_dir)):
        return "running", where or f"process {owner.process} on {owner.host}"
    if not (run_dir / LOG_DIR).exists():
        return "planned", where
    by_code = {None: "unknown" if identity and job is None else "ended", 0: "finished", Stopped.exit_code: "stopped"}
    return by_code.get(code, "failed"), where


def show_status(options: StatusOptions) -> int:
    """Print how one run stands, or a table of all runs in a folder, the newest first."""
    now = time.time()
    if options.run is not None:
        print("\n".join(status_lines(find_status(_folder(options.run)), now)))
        return 0
    root = Path(options.runs)
    folders = [file.parent for depth in ("*", "*/*") for file in root.glob(f"{depth}/{RUN_FILE}")]
    if not folders:
        raise RequestError.of("runs", f"there is no run in {root}", "name the folder of your runs, as runs=FOLDER")
    found = []
    for folder in folders:
        with contextlib.suppress(DistFtError):  # a plan of another version
            found.append(find_status(folder))
    print("\n".join(table_lines(found, root, now)))
    return 0


def table_lines(found: Sequence[Status], root: Path, now: float) -> Iterator[str]:
    """Yield a table of runs."""
    rows = [("run", "state", "step", "loss", "last step")]
    for run in sorted(found, key=lambda run: run.updated or 0.0, reverse=True):
        state = run.state if run.code in (None, 0) else f"{run.state} ({run.code})"
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        rows.append((str(run.folder.relative_to(root)), state, f"{run.step}{run.total}", loss, _age(run.updated, now)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def status_lines(run: Status, now: float) -> Iterator[str]:
    """Yield what is known of one run."""
    code = "" if run.code is None else f", exit code {run.code}"
    yield f"{run.folder}"
    yield f"  state   {run.state}{code}{f' ({run.where})' if run.where else ''}"
    loss = "" if run.loss is None else f", loss {run.loss:.4f}"
    yield f"  step    {run.step}{run.total}{loss}{f', {age}' if (age := _age(run.updated, now)) else ''}"
    newest = next(iter(saved_steps(run.folder / CHECKPOINTS)), None)
    yield f"  saved   {newest.name.replace('-', ' ') if newest else 'nothing yet'}"
    if run.code:
        for line in str(read_object(run.folder / FAILURE_FILE).get("report", "no report")).splitlines():
            yield f"  {line}"


def show_logs(options: LogsOptions) -> int:
    """Print the end of the output of a run; with `follow`, go on until the run has ended."""
    folder = _folder(options.run)
    read_plan(folder)
    file, convert = _find_log(folder, options.rank)
    position, left = 0, options.lines
    while True:
        ended = not options.follow or not find_status(folder).is_active  # before reading, so that nothing is missed
        if file.exists():
            with file.open("rb") as content:
                position = max(position, file.stat().st_size - TAIL_BYTES) if left else position
                content.seek(position)
                whole = content.read().rpartition(b"\n")
            position += len(whole[0]) + len(whole[1])
            lines = whole[0].decode("utf-8", "replace").splitlines()
            for line in filter(None, map(convert, lines[-left:] if left else lines)):
                print(line, flush=True)
            left = 0  # afterwards, all that is new
        if ended:
            return 0
        time.sleep(POLL_S)


def _find_log(folder: Path, rank: int | None) -> tuple[Path, Callable[[str], str]]:
    """Return the file with the output of a run, and how a line of it is shown."""
    if rank is not None:
        file = folder / LOG_DIR / f"rank-{rank}.log"
        if not file.exists():
            raise RequestError.of("rank", f"{file} does not exist", f"see {folder / LOG_DIR}")
        return file, str
    if identity := read_object(folder / JOB_FILE).get("job"):
        return folder / LOG_DIR / f"job-{identity}.log", str
    return folder / METRICS_FILE, show_metrics  # the output of a command in the foreground is where it was started


def show_metrics(line: str) -> str:
    """Return the losses and scores of a line of metrics.jsonl for the terminal."""
    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        found = json.loads(line)
    shown = [
        f"{key.removeprefix('train/')} {value:.4g}"
        for key, value in found.items()
        if key.startswith(("train/", "eval/")) and isinstance(value, int | float)
    ]
    return "  ".join([f"step {found.get('step')}", *shown]) if shown else ""


def cancel(options: CancelOptions) -> int:
    """Stop a run with a checkpoint, or with `now` without.

    Raises:
        RequestError: If the run is neither queued nor running.
    """
    folder = _folder(options.run)
    status = find_status(folder)
    if not status.is_active:
        raise RequestError.of(str(folder), f"does not run ({status.state})", "see `dist-ft status`")
    if identity := read_object(folder / JOB_FILE).get("job"):
        if options.now or status.state == "queued":
            cancel_job(identity)
            print(f"{folder}: job {identity} is cancelled")
            return 0
        cancel_job(identity, only_restarts=True)
    elif _signal_command(folder, options.now):
        print(f"{folder}: ended" if options.now else f"{folder}: saves a checkpoint and stops")
        return 0
    elif options.now:
        rule = f"runs elsewhere ({status.where}), where this machine cannot end it"
        raise RequestError.of(str(folder), rule, "run this command there, or leave out now=true")
    (folder / STOP_FILE).write_text(CAUSE, encoding="utf-8")
    print(f"{folder}: saves a checkpoint and stops")
    return 0


def _signal_command(folder: Path, now: bool) -> bool:
    """Send SIGTERM to the command that trains in a folder; return False if it does not run on this machine."""
    owner = find_owner(folder)
    try:
        command = psutil.Process(owner.process if owner else 0)
        if not any("dist-ft" in word or "dist_ft" in word for word in command.cmdline()):
            return False
        command.send_signal(signal.SIGTERM)
        if now:
            time.sleep(2 * REPEAT_S)
            command.send_signal(signal.SIGTERM)  # a second one ends the run at once
            with contextlib.suppress(psutil.TimeoutExpired):
                command.wait(ENDING_S)
                return True
            command.kill()  # its workers end with it
    except psutil.NoSuchProcess:
        return now
    return True


def _folder(run: str) -> Path:
    path = Path(run)
    return path.parent if path.name == RUN_FILE else path


def _last_step(run_dir: Path) -> dict[str, Any]:
    """Return the last line of metrics.jsonl with a loss of training."""
    with contextlib.suppress(OSError), (run_dir / METRICS_FILE).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, AttributeError):
                if "train/loss" in (found := json.loads(line)):
                    return dict(found)
    return {}


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None


def _age(updated: float | None, now: float) -> str:
    if updated is None:
        return ""
    seconds = max(0, round(now - updated))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
