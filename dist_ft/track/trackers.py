"""Construction of the trackers of a run from its configuration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.plan import LOG_DIR, METRICS_FILE, RECORD_FILE, TRACKING_FILE, Plan
from ..config.track import Service
from ..errors import MachineError
from ..process.place import Worker
from ..protocols import Tracker
from ..state import Progress
from .compose import Guarded, NullTracker, Trackers
from .jsonl import JsonLines
from .needs import missing_package
from .progress import open_log_of_progress, open_progress
from .report import open_report
from .secrets import hide_secrets, shown_settings


def build_tracker(plan: Plan, progress: Progress, steps: int, worker: Worker) -> tuple[Tracker, str | None]:
    """Build the tracker of a rank.

    Args:
        plan: Plan of the run.
        progress: Progress of the run, with the W&B run ID to resume.
        steps: Total number of steps.
        worker: This worker; only rank 0 tracks metrics.

    Returns:
        The tracker, and the W&B run ID to store in checkpoints.

    Raises:
        MachineError: A tracker's package is not installed, or W&B is to be online and has no API key.
    """
    if not worker.place.is_main:
        return NullTracker(), progress.tracker_id
    config = plan.config
    wandb: Tracker = NullTracker()
    identity = progress.tracker_id
    known: dict[str, dict[str, str]] = read_tracking(plan.run_dir) if progress.step else {}
    if config.track.uses_wandb:
        from .wandb import open_wandb  # W&B takes a while to import

        wandb, identity = open_wandb(
            config.track,
            run_dir=plan.run_dir,
            run_name=config.run_name,
            settings=_settings(plan, progress),
            run_id=progress.tracker_id,
            best=f"eval/{config.train.metric_for_best_model}",
            warn=worker.say,
        )
        if url := getattr(wandb, "url", None):
            worker.say(f"W&B: {url}")
            known["wandb"] = {"url": url}
    others = [Guarded(name, tracker, worker.say) for name, tracker in _open_others(plan, progress, known, worker.say)]
    if known:
        (plan.run_dir / TRACKING_FILE).write_text(json.dumps(known, indent=1), encoding="utf-8")
    lines = JsonLines(plan.run_dir / METRICS_FILE, after_step=progress.step)
    shown = open_progress(steps, after_step=progress.step, file=worker.terminal, above=worker.above)
    logged = open_log_of_progress(steps, plan.run_dir / LOG_DIR)
    return Trackers([lines, shown, logged, wandb, *others, open_report(config.track, plan.run_dir)]), identity


def read_tracking(run_dir: Path) -> dict[str, dict[str, str]]:
    """Return what tracking.json of a run says of each tracker: its `url` or `run_id`; empty without the file."""
    return _read_object(run_dir / TRACKING_FILE)


def _read_object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _open_others(
    plan: Plan, progress: Progress, known: dict[str, dict[str, str]], say: Callable[[str], None]
) -> Iterator[tuple[str, Tracker]]:
    """Open the trackers besides W&B, and say where they are. One that cannot be opened is left out with a warning."""
    track = plan.config.track
    if not track.others:
        return
    name, settings = track.run_name or plan.config.run_name, hide_secrets(_settings(plan, progress))
    for service in track.others:
        if problem := missing_package(service):
            raise MachineError(problem)
        try:
            yield service, _open(service, plan, progress, name, settings, known, say)
        except Exception as error:  # training must not fail because tracking does
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"{service} cannot start ({reason}) and is disabled")


def _open(
    service: Service,
    plan: Plan,
    progress: Progress,
    name: str,
    settings: Mapping[str, Any],
    known: dict[str, dict[str, str]],
    say: Callable[[str], None],
) -> Tracker:
    track = plan.config.track
    if service == "tensorboard":
        from .tensorboard import FOLDER, TensorBoard

        say(f"TensorBoard: tensorboard --logdir {plan.run_dir / FOLDER}")
        return TensorBoard(plan.run_dir, settings, after_step=progress.step)
    if service == "mlflow":
        from .mlflow import MLflow

        mlflow = MLflow(track.project, name, settings, known.get("mlflow", {}).get("run_id"))
        say(f"MLflow: run {mlflow.run_id} in the experiment {track.project}")
        known["mlflow"] = {"run_id": mlflow.run_id}
        return mlflow
    from .trackio import Trackio

    say(f"Trackio: trackio show --project {track.project}")
    return Trackio(track.project, name, settings, resumes=progress.step > 0)


def _settings(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Return what trackers show: the configuration, the plan, versions, and accepted changes of a resumed run."""
    shown = shown_settings(plan.config)
    shown["plan"] = plan.model_dump(mode="json", exclude={"config", "origins"})
    record = _read_object(plan.run_dir / RECORD_FILE)
    shown |= {key: record[key] for key in ("versions", "devices", "platform") if key in record}
    if progress.accepted:
        shown["accepted_changes"] = list(progress.accepted)
    return shown
