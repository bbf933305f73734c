"""What trackers need on a machine: packages, and the key of W&B. Imports none of them.

It is known when a run is planned, and asked again by rank 0.
"""

from __future__ import annotations

import netrc
import urllib.parse
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from ..config.track import Service, TrackConfig
from ..errors import MachineError, Problem

Variable = Callable[[str], "str | None"]  # the value of an environment variable; None if it is empty or not set
NO_KEY = "no W&B API key was found in WANDB_API_KEY or ~/.netrc"


def find_mode(wanted: str, variable: Variable) -> str:
    """Resolve `track.wandb` to online, offline or off.

    `auto` follows WANDB_MODE; if that is not set, it is online if an API key is found, and offline otherwise.

    Raises:
        MachineError: If the mode is online and no API key is found.
    """
    if wanted == "auto":
        modes = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
        wanted = modes.get(variable("WANDB_MODE") or "", "online" if has_key(variable) else "offline")
    if wanted == "online" and not has_key(variable):
        raise MachineError.of(
            "track.wandb=online",
            NO_KEY,
            "run `wandb login`, set WANDB_API_KEY, or set track.wandb=offline and run `wandb sync` later",
        )
    return wanted


def has_key(variable: Variable) -> bool:
    """Return whether the environment or the netrc file has an API key for the W&B server."""
    if variable("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(variable("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        entries = netrc.netrc(variable("NETRC") or str(Path.home() / ".netrc"))
    except (OSError, netrc.NetrcParseError):
        return False
    return host in entries.hosts


def describe_mode(wanted: str, variable: Variable) -> str:
    """Return what `track.wandb` becomes on this machine, and why."""
    try:
        mode = find_mode(wanted, variable)
    except MachineError as error:
        return f"online, but {error.problems[0].rule}: the run would not start"
    if wanted == "auto" and variable("WANDB_MODE"):
        return f"{mode} (WANDB_MODE={variable('WANDB_MODE')})"
    if wanted == "auto" and mode == "offline":
        return f"offline ({NO_KEY}; run `wandb login`, or `wandb sync` later)"
    return f"{mode} (an API key was found)" if mode == "online" else mode


def missing_package(service: Service) -> Problem | None:
    """Return the problem that the package of a tracker is not installed, or None."""
    if find_spec(service) is not None:  # packages are named like the choices
        return None
    way_out = f"run pip install 'dist-ft[{service}]', or remove it from track.to"
    return Problem("track.to", f"{service} requires the package {service}, which is not installed", way_out)


def tracker_problems(track: TrackConfig, variable: Variable) -> Iterator[Problem]:
    """Yield what this machine lacks for the trackers of a run: a package, or the key of W&B."""
    yield from filter(None, map(missing_package, track.others))
    if track.uses_wandb:
        try:
            find_mode(track.wandb, variable)
        except MachineError as error:
            yield from error.problems
