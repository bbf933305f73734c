"""Hosts of a hostfile: parsing, and checks of every host before workers start there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import Problem, RequestError

LINE = re.compile(r"^(?P<host>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s+slots\s*=\s*(?P<slots>[1-9][0-9]*)$")
LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
CHECK_LIMIT_S = 60.0
SWEEP_LIMIT_S = 15.0
LOOPBACK_NAME = "its host name resolves to 127.…, so workers on other hosts cannot reach it"
PACKAGES = ("torch", "transformers", "deepspeed")

# Runs on each host with the Python of the workers. Arguments: marker file, port to check (0: none), package names.
PROBE = """
import importlib.metadata as m, importlib.util as u, json, pathlib, platform, socket, sys
marker, port, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
spec = u.find_spec("dist_ft")
try: word = pathlib.Path(marker).read_text()
except OSError as error: word = None
try: own = socket.gethostbyname(socket.gethostname())
except OSError: own = None
free = True
if port:
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try: probe.bind(("", port)); probe.listen()
    except OSError: free = False
print(json.dumps(dict(python=platform.python_version(), dist_ft=spec is not None and spec.origin, marker=word, own=own,
    free=free, versions={n: version(n) for n in names})))
"""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """Parse a file with `HOST slots=N` lines; `#` starts a comment.

    Host names are passed to ssh and to shells. They may contain only letters, digits, `.`, `_` and `-`, and must not
    start with `-`, because `-oProxyCommand=…` would run a command.

    Raises:
        RequestError: With one problem for each invalid line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError.of("launch.hostfile", f"{path} does not exist", "write lines of HOST slots=N") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError.of("launch.hostfile", f"{path} cannot be read: {error}", "correct the file") from None
    hosts: dict[str, Host] = {}
    problems = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = LINE.match(line)
        if match is None:
            problems.append(Problem(f"{path}:{number}", f"{line!r} is not HOST slots=N", "example: node-1 slots=8"))
        elif match["host"] in hosts:
            problems.append(Problem(f"{path}:{number}", f"{match['host']} is listed twice", "write one line per host"))
        else:
            hosts[match["host"]] = Host(match["host"], int(match["slots"]))
    if not hosts and not problems:
        problems.append(Problem(str(path), "lists no host", "write one `HOST slots=N` line for each host"))
    if len(hosts) > 1:
        local = [name for name in hosts if name in LOCAL_NAMES or name.startswith("127.")]
        problems += [
            Problem(str(path), f"{name} is a different machine on each host", "use a name that all hosts can resolve")
            for name in local
        ]
    if problems:
        raise RequestError(*problems)
    return list(hosts.values())


def choose_hosts(hosts: Sequence[Host], nodes: int | None, workers: int | None) -> tuple[list[Host], int]:
    """Return the first `nodes` hosts and the number of workers on each.

    Raises:
        RequestError: If there are too few hosts or slots, or the slots differ and `workers` is None.
    """
    if nodes is not None and nodes > len(hosts):
        raise RequestError.of(
            "launch.nodes",
            f"{nodes} nodes, but the hostfile has {len(hosts)} hosts",
            "lower launch.nodes, or add hosts",
        )
    taken = list(hosts[:nodes])
    least = min(taken, key=lambda host: host.slots)
    if workers is None:
        if any(host.slots != least.slots for host in taken):
            shown = ", ".join(f"{host.name} has {host.slots}" for host in taken)
            rule = f"slots differ between hosts ({shown}), but all hosts must run the same number of workers"
            raise RequestError.of("launch.workers_per_node", rule, f"set launch.workers_per_node={least.slots}")
        return taken, least.slots
    if workers > least.slots:
        rule = f"{workers} workers on each host, but {least.name} has {least.slots} slots"
        raise RequestError.of("launch.workers_per_node", rule, f"set it to {least.slots}, or correct the hostfile")
    return taken, workers


def check_hosts(
    hosts: Sequence[Host], *, python: str, cwd: str, run_dir: Path, port: int, interface_given: bool = False
) -> list[Problem]:
    """Log in to all hosts in parallel and check that workers can run there.

    Args:
        hosts: Hosts that run workers; the first one hosts the rendezvous.
        python: Python interpreter of the workers.
        cwd: Working directory of the workers.
        run_dir: Folder that all hosts must share; a marker file is written here and looked for on each host.
        port: Port that must be free on the first host.
        interface_given: Whether GLOO_SOCKET_IFNAME is set, so that host names need not resolve to a reachable address.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    marker, word = run_dir / f".seen-{secrets.token_hex(8)}", secrets.token_hex(8)
    marker.write_text(word)

    def probe(place: int) -> list[Problem]:
        host = hosts[place]
        words = [python, "-c", PROBE, str(marker), str(0 if place else port), *PACKAGES]
        command = f"cd {shlex.quote(cwd)} && exec {' '.join(map(shlex.quote, words))}"
        try:
            run = _ssh(host, command, CHECK_LIMIT_S)
        except subprocess.TimeoutExpired:
            rule = f"did not respond within {CHECK_LIMIT_S:.0f} s"
            return [Problem(host.name, rule, f"check that `ssh {host.name} hostname` works")]
        problems = _judge(host, run, python=python, cwd=cwd, word=word, run_dir=run_dir, port=port)
        return problems if len(hosts) > 1 and not interface_given else [p for p in problems if p.rule != LOOPBACK_NAME]

    try:
        with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
            return [problem for found in pool.map(probe, range(len(hosts))) for problem in found]
    finally:
        marker.unlink(missing_ok=True)


def _judge(
    host: Host,
    run: subprocess.CompletedProcess[str],
    *,
    python: str,
    cwd: str,
    word: str,
    run_dir: Path,
    port: int,
) -> list[Problem]:
    """Return the problems that the output of the probe on a host shows."""
    last = (run.stderr.strip().splitlines() or ["no message"])[-1]
    if run.returncode == 255:
        return [Problem(host.name, f"ssh cannot log in: {last}", f"make `ssh -o BatchMode=yes {host.name} true` work")]
    if run.returncode == 127 or f"{python}:" in last:
        return [
            Problem(
                host.name, f"{python} does not exist", "install the environment at the same path, or share the disk"
            )
        ]
    try:
        answer = json.loads(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return [Problem(host.name, f"cannot run a worker: {last}", f"make {cwd} and {python} available on this host")]
    found = []
    if not answer["dist_ft"]:
        found.append(Problem(host.name, f"its {python} cannot import dist_ft", "install dist_ft, or share the disk"))
    ours = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    theirs = {"python": answer["python"], **answer["versions"]}
    for name, version in ours.items():
        if theirs[name] != version:
            rule = f"has {name} {theirs[name]}, but this machine has {version}"
            found.append(Problem(host.name, rule, "install the same versions on all hosts"))
    if answer["marker"] != word:
        rule = f"cannot read files that this machine writes to {run_dir}"
        found.append(Problem(host.name, rule, "set output_dir to a folder on a file system that all hosts share"))
    if not answer["free"]:
        found.append(Problem(host.name, f"port {port} is in use there", "set launch.master_port to a free port"))
    if str(answer["own"]).startswith("127."):
        way_out = "set GLOO_SOCKET_IFNAME=INTERFACE (see `ip -br addr`), or correct /etc/hosts on that host"
        found.append(Problem(host.name, LOOPBACK_NAME, way_out))
    return found


def sweep_hosts(hosts: Sequence[Host], run_file: Path) -> None:
    """Kill the workers of a run that are still alive on its hosts."""
    # The brackets keep the pattern from matching the shell that runs this command.
    pattern = f"[d]ist_ft[.]worker {re.escape(str(run_file))}"
    command = f"pkill -KILL -f -- {shlex.quote(pattern)}"

    def end(host: Host) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _ssh(host, command, SWEEP_LIMIT_S)

    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        list(pool.map(end, hosts))


def _ssh(host: Host, command: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    words = [*SSH, host.name, command]
    return subprocess.run(words, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL, check=False)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
