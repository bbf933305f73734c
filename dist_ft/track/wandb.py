"""Weights & Biases (W&B) tracking, online or offline, which never logs secrets and never interrupts training."""

from __future__ import annotations

import contextlib
import shlex
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from ..config.track import TrackConfig
from ..process.place import environ
from ..protocols import Tracker
from ..state import LOWER_IS_BETTER, Metrics
from .compose import NullTracker
from .needs import find_mode
from .secrets import hide_secrets

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 120
SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


class WandbTracker:
    """Tracker of a W&B run. The first error that W&B raises disables the tracker with a warning.

    Args:
        run: Run returned by `wandb.init`.
        warn: Shows a line to the user.
        sync: Folder with what is to be uploaded later, if the run is offline.
    """

    def __init__(self, run: Any, warn: Callable[[str], None], sync: Path | None = None) -> None:
        self._run = run
        self._warn = warn
        self._sync = sync

    @property
    def url(self) -> str | None:
        """Page of the run; None offline."""
        return None if self._sync is not None else getattr(self._run, "url", None)

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log under the same metric names as in metrics.jsonl; W&B ignores steps that it has already recorded."""
        self._call("log", dict(metrics), step=step)

    def follow(self, metric: str) -> None:
        """Let the summary of the run also show the best value of a metric."""
        name = metric.removeprefix("eval/").partition("/")[0]
        self._call("define_metric", metric, summary="min" if name in LOWER_IS_BETTER else "max")

    def close(self, error: BaseException | None = None) -> None:
        """Finish the run, as failed and with an alert if an error ended it.

        Data that was not uploaded remains on disk for `wandb sync`.
        """
        if error is not None:
            text = hide_secrets(str(error), secrets_here())
            self._call("alert", title=f"{getattr(self._run, 'name', 'run')} failed", text=text, level="ERROR")
        self._call("finish", exit_code=0 if error is None else 1)
        if self._run is not None:
            self._run = None
            # `finish` returns before the W&B service has written its file, and the service ends with this process.
            with contextlib.suppress(Exception):
                wandb.teardown()
            if self._sync is not None:
                self._warn(f"W&B was offline; upload the run with `wandb sync {shlex.quote(str(self._sync))}`")

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:
            folder = getattr(self._run, "dir", None)
            self._run = None
            reason = _first_line(error)
            self._warn(f"W&B failed ({reason}) and is disabled; upload the data in {folder} with `wandb sync`")


def open_wandb(
    config: TrackConfig,
    *,
    run_dir: Path,
    run_name: str,
    settings: Mapping[str, Any],
    run_id: str | None,
    best: str = "eval/loss",
    warn: Callable[[str], None] | None = None,
) -> tuple[Tracker, str | None]:
    """Start a W&B run in the folder `wandb` of the run directory, or resume the W&B run `run_id`.

    If W&B cannot be reached, the run is started offline; if this fails too, W&B is disabled for this run.

    Args:
        config: W&B mode, project, run name, group and tags.
        run_dir: Directory of the run.
        run_name: Name of the W&B run if `config` has none.
        settings: Configuration to log; values that look like secrets are replaced.
        run_id: ID of the W&B run to resume, from a checkpoint; None starts a new one.
        best: Metric of which the summary also has the best value.
        warn: Shows a line to the user; `warnings.warn` by default.

    Returns:
        The tracker, and the W&B run ID to store in checkpoints, which is `run_id` if W&B is disabled.

    Raises:
        MachineError: If `track.wandb` is `online` and no API key is found.
    """
    warn = warn or _warn
    mode = find_mode(config.wandb, environ)
    if mode == "off":
        return NullTracker(), run_id
    identity = run_id or uuid.uuid4().hex[:8]
    arguments = {
        "project": config.project,
        "name": config.run_name or run_name,
        "group": config.group,
        "tags": list(config.tags) or None,
        "config": hide_secrets(settings, secrets_here()),
        "id": identity,
    }
    modes = [mode] if mode == "offline" else ["online", "offline"]
    for attempt in modes:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                run = _begin(attempt, run_dir, arguments)
                tracker = WandbTracker(run, warn, Path(run.dir).parent if attempt == "offline" else None)
                tracker.follow(best)
                return tracker, identity
        except Exception as error:  # training must not fail because tracking does
            then = "starting offline" if attempt == "online" else "W&B is disabled"
            warn(f"W&B cannot start {attempt} ({_first_line(error)}); {then}")
            with contextlib.suppress(Exception):
                wandb.teardown()  # otherwise the W&B service considers the run ID to be in use
    return NullTracker(), run_id


def secrets_here() -> list[str]:
    """Return the secrets in the environment, which no file may hold."""
    return [value for value in map(environ, SECRET_VARIABLES) if value]


def _begin(mode: str, run_dir: Path, arguments: Mapping[str, Any]) -> Any:
    """Call `wandb.init` without capturing code, arguments, console output, package list or git remote."""
    wanted: dict[str, Any] = {
        "mode": mode,
        "root_dir": str(run_dir),
        "console": "off",
        "disable_code": True,
        "save_code": False,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "silent": True,
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S,
        "program": "dist-ft",
    }
    known = wandb.Settings.model_fields
    options = {name: value for name, value in wanted.items() if name in known}
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)  # wandb falls back to /tmp if this folder does not exist
    return wandb.init(**arguments, dir=str(run_dir), resume="allow", settings=wandb.Settings(**options))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
