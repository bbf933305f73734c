"""Where a run goes on, and what it leaves to go on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TextIO

from ..config.method import LoraKeys
from ..config.plan import CHECKPOINTS, REFERENCE_FILE, START_FILE, Plan
from ..errors import RequestError, TrainingError
from ..method.start import read_start
from ..process import comm
from ..process.place import Place
from ..state import Engine, Progress
from . import store as checkpoint


def resume(plan: Plan, engine: Engine, place: Place, terminal: TextIO) -> Progress:
    """Bring the engine to where the run stands, and say where that is; a new run stands at step 0.

    Checkpoints that are not sound are named on `terminal`.

    Raises:
        RequestError: the checkpoint named by train.resume is not sound.
    """
    wish, folder = plan.config.train.resume, plan.run_dir / CHECKPOINTS
    path: Path | None = None
    if place.is_main and wish == "auto":
        path, torn = checkpoint.newest_sound(folder)
        for problem in torn:
            print(f"dist-ft: {problem}", file=terminal, flush=True)
    elif wish not in ("auto", "never"):
        path = Path(wish)
        if reason := checkpoint.verify(path):
            raise RequestError.of("train.resume", f"{path}: {reason}", "name a sound checkpoint, or use auto")
    path = comm.from_main(path)
    if path is None:
        return Progress(0, place.world_size, plan.config.engine.name, None, None, None, 0)
    _bring(engine, path)
    return checkpoint.read_progress(path)


def restore(plan: Plan, engine: Engine, name: str) -> None:
    """Bring the engine to one of the run's own checkpoints.

    Raises:
        TrainingError: it is not sound.
    """
    path = plan.run_dir / CHECKPOINTS / name
    if reason := checkpoint.verify(path):
        raise TrainingError.of(str(path), f"the best step's checkpoint: {reason}", "export another: dist-ft export")
    _bring(engine, path)


def _bring(engine: Engine, path: Path) -> None:
    state = engine.state()
    checkpoint.load(path, state)
    engine.load(state)


def settle_start(plan: Plan, place: Place) -> None:
    """Before the model is built: have a run that goes on start as it did, and a new one by itself; rank 0 sees to it.

    Raises:
        RequestError: it goes on, and its start is not there.
    """
    if not place.is_main:
        return
    method = plan.config.method
    if isinstance(method, LoraKeys) and method.moves_base and (start := _settle(plan, START_FILE)):
        read_start(start)
    _settle(plan, REFERENCE_FILE)  # where it is not there, the model as it is built gives it again


def _settle(plan: Plan, name: str) -> Path | None:
    """Where a run that goes on has the file that it left at its start; None for a new run, which must find none."""
    wish, own = plan.config.train.resume, plan.run_dir / name
    if wish not in ("auto", "never"):
        given = Path(wish).resolve().parent.parent / name
        if given.exists() and given != own.resolve():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(given, own)
        return given
    if wish == "auto" and checkpoint.steps(plan.run_dir / CHECKPOINTS):
        return own
    own.unlink(missing_ok=True)
    return None


def save_checkpoint(plan: Plan, engine: Engine, progress: Progress, place: Place) -> None:
    """Write a checkpoint, point `best` at it if it is the best, and remove what is no longer kept."""
    folder = plan.run_dir / CHECKPOINTS
    path = checkpoint.save(folder, engine.state(), progress)
    if place.is_main:
        if progress.best_step == progress.step:
            checkpoint.point(folder / "best", path)
        checkpoint.prune(folder, plan.config.train.save_total_limit, progress.best_step)
