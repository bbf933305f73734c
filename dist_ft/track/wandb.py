"""Weights & Biases: the run's metrics and settings, online or on disk; never its secrets, never in training's way."""

from __future__ import annotations

import contextlib
import netrc
import re
import sys
import urllib.parse
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from ..config.track import TrackConfig
from ..errors import MachineError
from ..process.place import environ
from ..state import Metrics, Tracker
from .compose import NullTracker

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 120
SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
HIDDEN = "[hidden]"


class WandbTracker:
    """A W&B run. Whatever W&B raises is a warning, said once; training goes on.

    Args:
        run: the run, as `wandb.init` gave it.
        warn: takes a sentence for the user.
    """

    def __init__(self, run: Any, warn: Callable[[str], None]) -> None:
        self._run = run
        self._warn = warn

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log under the same names as everywhere; steps that W&B has already are W&B's to ignore."""
        self._call("log", dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run; what could not be sent stays on disk for `wandb sync`."""
        self._call("finish")
        if self._run is not None:
            self._run = None
            # `finish` returns before W&B's service has written its file, and the service ends with this process.
            with contextlib.suppress(Exception):
                wandb.teardown()

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:
            folder = getattr(self._run, "dir", None)
            self._run = None
            reason = _first_line(error)
            self._warn(f"W&B failed and is given up ({reason}); what it has is in {folder}, see `wandb sync`")


def open_wandb(
    config: TrackConfig,
    *,
    run_dir: Path,
    run_name: str,
    settings: Mapping[str, Any],
    run_id: str | None,
    warn: Callable[[str], None] | None = None,
) -> tuple[Tracker, str | None]:
    """Begin a W&B run in `run_dir`/wandb, or go on with the run `run_id`.

    Args:
        config: mode, project, name and tags.
        run_dir: the run's folder.
        run_name: the name in W&B unless `config` has one.
        settings: what is shown as the run's config; values that look like secrets are hidden.
        run_id: of the run that a checkpoint belongs to.
        warn: takes a sentence for the user; a Python warning if not given.

    Returns:
        The tracker, and the run's id to keep in checkpoints (None without W&B; `run_id` is then still valid).

    Raises:
        MachineError: `online` was asked for, and no key is found.
    """
    warn = warn or _warn
    mode = find_mode(config.wandb)
    if mode == "off":
        return NullTracker(), run_id
    identity = run_id or uuid.uuid4().hex[:8]
    arguments = {
        "project": config.project,
        "name": config.run_name or run_name,
        "group": config.group,
        "tags": list(config.tags) or None,
        "config": hide_secrets(settings),
        "id": identity,
    }
    modes = [mode] if mode == "offline" else ["online", "offline"]
    for attempt in modes:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return WandbTracker(_begin(attempt, run_dir, arguments), warn), identity
        except Exception as error:  # a tracker's failure is never the training's
            then = "goes on offline" if attempt == "online" else "is left out"
            warn(f"W&B could not begin {attempt} ({_first_line(error)}) and {then}")
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service takes the id for used otherwise
    return NullTracker(), run_id


def find_mode(wanted: str) -> str:
    """What `track.wandb` becomes here: online, offline or off.

    `auto` follows WANDB_MODE where that is set, as W&B's users expect; then it is online where a key is found.

    Raises:
        MachineError: `online` without a key.
    """
    if wanted == "auto":
        asked = {"offline": "offline", "dryrun": "offline", "disabled": "off"}.get(environ("WANDB_MODE") or "")
        return asked or ("online" if has_key() else "offline")
    if wanted == "online" and not has_key():
        raise MachineError.of(
            "track.wandb=online",
            "no W&B key is found: neither WANDB_API_KEY nor an entry of ~/.netrc",
            "run `wandb login`, set WANDB_API_KEY, or set track.wandb=offline and `wandb sync` later",
        )
    return wanted


def has_key() -> bool:
    """Whether W&B can log in without asking: by environment, or by the machine's netrc file."""
    if environ("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(environ("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        entries = netrc.netrc(environ("NETRC") or str(Path.home() / ".netrc"))
    except (OSError, netrc.NetrcParseError):
        return False
    return host in entries.hosts


def hide_secrets(value: Any) -> Any:
    """`value` (nested) with what looks like a secret replaced: the values of such keys, and parts of strings."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if _names_secret(str(k)) and v else hide_secrets(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(item) for item in value]
    if isinstance(value, str):
        for secret in filter(None, map(environ, SECRET_VARIABLES)):
            value = value.replace(secret, HIDDEN)
        value = re.sub(r"(?i)\b(\w*(?:token|key|secret|passw(?:or)?d|signature)\w*=)[^\s&;'\"]+", rf"\1{HIDDEN}", value)
        return re.sub(r"://[^/\s@]+@", f"://{HIDDEN}@", value)
    return value


def _names_secret(key: str) -> bool:
    return re.search(r"(?i)(^|[_-])(api_?key|token|secret|passw(or)?d|credentials?)$", key) is not None


def _begin(mode: str, run_dir: Path, arguments: Mapping[str, Any]) -> Any:
    """`wandb.init` with nothing captured: no code, no argv, no console, no machine's package list, no git remote."""
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
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)  # wandb falls back to /tmp where there is no such folder
    return wandb.init(**arguments, dir=str(run_dir), resume="allow", settings=wandb.Settings(**options))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
