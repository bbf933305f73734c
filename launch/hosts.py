"""The hosts of a hostfile: read strictly, and each one looked at before anything starts there."""

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
LOOPBACK_NAME = "its own name means 127.…, so other hosts' workers cannot reach those there"
PACKAGES = ("torch", "transformers", "deepspeed")

# Runs on each host with the python of the workers; takes a marker file, the folder of this package, and a port or 0.
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
    """A line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file of `HOST slots=N` lines; `#` begins a comment.

    A name is given to ssh and to shells, so nothing but letters, digits, `.`, `_` and `-` is taken, and no `-` in front
    (`-oProxyCommand=…` would run a command).

    Raises:
        RequestError: with every line that is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError.of("launch.hostfile", f"{path}: no such file", "write lines of HOST slots=N") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError.of("launch.hostfile", f"{path} cannot be read: {error}", "mend the file") from None
    hosts: dict[str, Host] = {}
    problems = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = LINE.match(line)
        if match is None:
            problems.append(Problem(f"{path}:{number}", f"{line!r} is not HOST slots=N", "write, say, node-1 slots=8"))
        elif match["host"] in hosts:
            problems.append(Problem(f"{path}:{number}", f"{match['host']} is named twice", "give a host one line"))
        else:
            hosts[match["host"]] = Host(match["host"], int(match["slots"]))
    if not hosts and not problems:
        problems.append(Problem(str(path), "names no host", "write lines of HOST slots=N"))
    if len(hosts) > 1:
        local = [name for name in hosts if name in LOCAL_NAMES or name.startswith("127.")]
        problems += [
            Problem(str(path), f"{name} is another machine on each host", "name the host as the others reach it")
            for name in local
        ]
    if problems:
        raise RequestError(*problems)
    return list(hosts.values())


def choose_hosts(hosts: Sequence[Host], nodes: int | None, workers: int | None) -> tuple[list[Host], int]:
    """The first `nodes` hosts and how many workers each gets.

    Raises:
        RequestError: fewer hosts or slots than asked for, or different slots and no number of workers.
    """
    if nodes is not None and nodes > len(hosts):
        raise RequestError.of("launch.nodes", f"{nodes} nodes, but the hostfile has {len(hosts)} hosts", "name more")
    taken = list(hosts[:nodes])
    least = min(taken, key=lambda host: host.slots)
    if workers is None:
        if any(host.slots != least.slots for host in taken):
            shown = ", ".join(f"{host.name} has {host.slots}" for host in taken)
            rule = f"the hosts' slots differ ({shown}), and every host gets as many workers"
            raise RequestError.of("launch.workers_per_node", rule, f"set launch.workers_per_node={least.slots}")
        return taken, least.slots
    if workers > least.slots:
        rule = f"{workers} workers a host, but {least.name} has {least.slots} slots"
        raise RequestError.of("launch.workers_per_node", rule, f"set it to {least.slots}, or mend the hostfile")
    return taken, workers


def check_hosts(
    hosts: Sequence[Host], *, python: str, cwd: str, run_dir: Path, port: int, interface_given: bool = False
) -> list[Problem]:
    """Log in to every host at once and see that a worker could run there.

    Args:
        hosts: who gets workers; the first one holds the rendezvous.
        python: the interpreter of the workers.
        cwd: where they start.
        run_dir: must be the same folder on all hosts; a marker is put there and looked for.
        port: must be free on the first host.
        interface_given: GLOO_SOCKET_IFNAME is set, so that a host's own name does not matter.
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
            rule = f"gave no answer within {CHECK_LIMIT_S:.0f} s"
            return [Problem(host.name, rule, f"try: ssh {host.name} hostname")]
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
    """What a host's answer tells."""
    last = (run.stderr.strip().splitlines() or ["no message"])[-1]
    if run.returncode == 255:
        return [
            Problem(host.name, f"ssh does not get in: {last}", f"`ssh -o BatchMode=yes {host.name} true` must work")
        ]
    if run.returncode == 127 or f"{python}:" in last:
        return [
            Problem(host.name, f"has no {python}", "install the same environment at the same path, or share the disk")
        ]
    try:
        answer = json.loads(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return [Problem(host.name, f"cannot run a worker: {last}", f"the folder {cwd} and {python} must be there too")]
    found = []
    if not answer["dist_ft"]:
        found.append(Problem(host.name, f"{python} there cannot import dist_ft", "install it there, or share the disk"))
    ours = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    theirs = {"python": answer["python"], **answer["versions"]}
    for name, version in ours.items():
        if theirs[name] != version:
            rule = f"has {name} {theirs[name]}, this machine {version}"
            found.append(Problem(host.name, rule, "install the same versions on all hosts"))
    if answer["marker"] != word:
        rule = f"does not see {run_dir} of this machine"
        found.append(Problem(host.name, rule, "set output_dir to a folder on a file system that all hosts share"))
    if not answer["free"]:
        found.append(Problem(host.name, f"port {port} is in use there", "set launch.master_port to a free one"))
    if str(answer["own"]).startswith("127."):
        way_out = "export GLOO_SOCKET_IFNAME=INTERFACE (see `ip -br addr`), or mend its /etc/hosts"
        found.append(Problem(host.name, LOOPBACK_NAME, way_out))
    return found


def sweep_hosts(hosts: Sequence[Host], run_file: Path) -> None:
    """Kill the workers of a run that are left on its hosts.

    The brackets keep the pattern from matching the shell that runs this very command.
    """
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
