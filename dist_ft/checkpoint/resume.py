"""Resuming a run from a checkpoint, and saving the checkpoints of a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..config.method import LoraKeys
from ..config.plan import CHECKPOINTS, REFERENCE_FILE, START_FILE, Plan
from ..config.run import settings_of
from ..errors import RequestError, TrainingError
from ..prepare import Prepared
from ..process import comm
from ..process.place import Place, Worker
from ..protocols import Engine
from ..state import Progress, unwatched
from . import store as checkpoint
from .files import read_progress
from .fingerprints import accept_changes, take_fingerprints
from .lineage import begin, set_strangers_aside
from .reader import SafeReader
from .saver import Saver

STATE_BYTES = 12  # of a trained parameter: its float32 value and both moments


@dataclass(frozen=True)
class Start:
    """What a run starts from: a verified checkpoint and its progress, or step 0 without one."""

    path: Path | None
    progress: Progress


def choose_start(plan: Plan, prepared: Prepared, worker: Worker) -> Start:
    """Choose the checkpoint that `train.resume` selects, before anything is loaded. Collective.

    With `train.resume=auto`, this is the newest valid checkpoint of the run; invalid ones are reported. Checkpoints in
    the run's folder that the chosen one does not descend from are moved aside.

    Raises:
        RequestError: The checkpoint at the path in `train.resume` is not valid, or what the run learns from has changed
            since the checkpoint and `train.accept_changes` does not accept it.
    """
    wish, folder = plan.config.train.resume, plan.run_dir / CHECKPOINTS
    path: Path | None = None
    if wish == "auto":
        path, problems = checkpoint.newest_sound(folder, worker.tick, settings_of(plan.config))
        for problem in problems:
            worker.say(str(problem))
    elif wish != "never":
        path = Path(wish)
        if reason := checkpoint.verify(path, worker.tick):
            raise RequestError.of("train.resume", f"{path}: {reason}", "set it to a valid checkpoint or to auto")
    start: Start = comm.on_main(lambda: _begin(plan, prepared, path, worker))
    return start


def _begin(plan: Plan, prepared: Prepared, path: Path | None, worker: Worker) -> Start:
    settings, now = settings_of(plan.config), take_fingerprints(plan, prepared, worker.tick)
    if path is None:
        new = Progress(0, worker.place.world_size, plan.config.engine.name, None, None, None, 0, fingerprints=now)
        return Start(None, begin(new, settings))
    progress, told = accept_changes(read_progress(path), now, plan.config.train.accept_changes)
    for line in told:
        worker.say(line)
    _clear_way(plan.run_dir / CHECKPOINTS, progress, worker)
    return Start(path, begin(progress, settings))


def resume(start: Start, engine: Engine, worker: Worker, steps: int) -> Progress:
    """Load the chosen checkpoint, if there is one, into the engine, and return the progress. Collective.

    Raises:
        RequestError: There are `steps` to train, and the checkpoint holds no optimizer state.
    """
    if start.path is None:
        return start.progress
    names = SafeReader(start.path).read_metadata().state_dict_metadata
    if start.progress.step < steps and not checkpoint.holds_moments(names):
        rule = f"holds no optimizer state (train.save_final_state=false), so it cannot go on to step {steps}"
        way_out = "set train.resume to an earlier checkpoint of this run, or restore the number of steps"
        raise RequestError.of(str(start.path), rule, way_out)
    _bring(engine, start.path, worker)
    return start.progress


def describe_room(plan: Plan, model: nn.Module) -> str:
    """Return what the checkpoints of a run need and what is free; before an engine shards the model. Collective.

    Raises:
        MachineError: The disk has no room for the checkpoints that the run keeps.
    """
    config = plan.config
    keeps_best = config.data.has("validation") and config.train.eval_steps is not None
    size = STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    told: str = comm.on_main(
        lambda: checkpoint.check_rooms(plan.run_dir / CHECKPOINTS, size, config.train, keeps_best=keeps_best)
    )
    return told


def _clear_way(folder: Path, progress: Progress, worker: Worker) -> None:
    """Move the checkpoints that do not lead to `progress` aside, and make no link point to one of them."""
    for problem in set_strangers_aside(folder, progress):
        worker.say(str(problem))
    for name, step in (("latest", progress.step), ("best", progress.best_step)):
        link, target = folder / name, folder / f"step-{step}"
        if link.is_symlink() and not link.exists():
            link.unlink()
            if target.exists():
                checkpoint.point(link, target)


def restore(plan: Plan, engine: Engine, worker: Worker, name: str) -> None:
    """Load one of the run's own checkpoints into the engine. Collective.

    Args:
        plan: Plan of the run.
        engine: Engine whose weights and optimizer state are replaced.
        worker: This worker.
        name: Folder name of the checkpoint, such as `step-100`.

    Raises:
        TrainingError: If the checkpoint is not valid.
    """
    path = plan.run_dir / CHECKPOINTS / name
    if reason := checkpoint.verify(path, worker.tick):
        raise TrainingError.of(
            str(path),
            f"the checkpoint of the best step is not valid: {reason}",
            "export another checkpoint with `dist-ft export`",
        )
    _bring(engine, path, worker)


def _bring(engine: Engine, path: Path, worker: Worker) -> None:
    state = engine.state()
    checkpoint.load(path, state, worker.tick)
    engine.load(state)


def settle_start(plan: Plan, place: Place) -> None:
    """Prepare the files with the initial state of the run on rank 0, before the model is built.

    These are the initial LoRA factors of PiSSA and OLoRA and the log-probabilities under the initial model. A resumed
    run reuses them, also from another run's folder if `train.resume` is a path there; a new run deletes old ones.

    Raises:
        RequestError: If the run is resumed and its initial LoRA factors are missing.
    """
    if not place.is_main:
        return
    method = plan.config.method
    if isinstance(method, LoraKeys) and method.moves_base and (start := _settle(plan, START_FILE)):
        from ..method.start import read_start  # imports peft

        read_start(start)
    _settle(plan, REFERENCE_FILE)  # not required: it is computed again from the initial model if it is missing


def _settle(plan: Plan, name: str) -> Path | None:
    """Return the path of the file `name` that a resumed run reuses; for a new run, delete the file and return None."""
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


def save_checkpoint(plan: Plan, engine: Engine, saver: Saver, worker: Worker, progress: Progress) -> None:
    """Save a checkpoint, point `best` to it if it is the best, and delete those that are not to be kept. Collective."""
    folder = plan.run_dir / CHECKPOINTS
    tick = unwatched if plan.config.train.async_save else worker.tick  # the thread's progress is not that of the run

    def finish(path: Path) -> None:
        if progress.best_step == progress.step:
            checkpoint.point(folder / "best", path)
        checkpoint.prune(folder, plan.config.train.checkpoints_kept, progress.best_step, tick)

    state = engine.state()
    if progress.complete and not plan.config.train.save_final_state:
        state = checkpoint.weights_of(state)
    saver.save(state, progress, finish)
