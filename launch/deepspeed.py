"""Launcher for the hosts of a hostfile, through DeepSpeed's multi-node launcher over pdsh and ssh."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping

from ..config.launch import HostfileConfig
from ..config.plan import Plan
from ..config.run import RunConfig
from ..errors import MachineError, Problem, RequestError
from . import restarts
from .hosts import check_hosts, choose_hosts, read_hostfile, sweep_hosts
from .launcher import WORKER_MODULE, Rendered, Workers, shell_lines, write_rendered
from .machine.environ import Site, export_lines

SCRIPT, HOSTFILE, ENV_FILE = "launch.sh", "hostfile", "workers.env"
PLAIN = re.compile(r"^[\w@+=:,./-]+$")  # characters that neither a shell nor pdsh (which expands %) changes
# Without these options, ssh waits forever for a host that stops responding.
KEEP_ALIVE = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"


class HostfileLauncher:
    """Start workers over ssh, in the foreground."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def resolve(self, config: RunConfig, origins: Mapping[str, str]) -> Workers:
        """Return the workers, from the hostfile. This machine is taken for one of the hosts.

        Raises:
            RequestError: If the hostfile is invalid or too small, or a remote shell would change a path.
        """
        launch = _launch(config)
        taken, workers = choose_hosts(read_hostfile(launch.hostfile), launch.nodes, launch.workers_per_node)
        # DeepSpeed inserts these values unquoted into a command for a remote shell.
        paths = {"output_dir": config.output_dir, "current folder": self.site.cwd, "python": self.site.python}
        pasted = {**paths, "launch.master_addr": launch.master_addr or "x"}
        problems = [
            Problem(key, f"{value!r} contains characters that a remote shell changes", "use letters, digits and ._-/")
            for key, value in pasted.items()
            if not PLAIN.match(value)
        ]
        if problems:
            raise RequestError(*problems)
        return Workers(config, origins, len(taken), workers, self.site.has_bfloat16)

    def render(self, plan: Plan) -> Rendered:
        """Render `launch.sh`, the hostfile with the selected hosts, and the environment of the workers."""
        launch = _launch(plan.config)
        folder = plan.run_dir
        hosts = read_hostfile(launch.hostfile)[: plan.nodes]
        command = [self.site.python, "-m", "deepspeed.launcher.runner"]
        command += [f"--hostfile={folder / HOSTFILE}", "--launcher=pdsh", "--force_multi"]
        command += [f"--num_nodes={plan.nodes}", f"--num_gpus={plan.workers_per_node}"]
        command += [f"--master_addr={launch.master_addr}"] if launch.master_addr else []
        command += [f"--master_port={launch.master_port}", "--log_level=warning", "--no_local_rank"]
        command += ["--module", WORKER_MODULE, str(plan.run_file)]
        keep_alive = self.site.environment.get("PDSH_SSH_ARGS_APPEND", "")
        env = {
            "DS_ENV_FILE": str(folder / ENV_FILE),
            "PDSH_SSH_ARGS_APPEND": f"{KEEP_ALIVE} {keep_alive}".strip(),
            "PDSH_RCMD_TYPE": "ssh",
        }
        if not self.site.devices:
            env["DS_ACCELERATOR"] = "cpu"  # for the launcher on this machine; workers detect their own accelerator
        lines = [
            "#!/bin/bash",
            f"# Trains {plan.config.run_name} on {plan.nodes} hosts with {plan.workers_per_node} workers each.",
            "# `dist-ft train` checks every host and then runs this script, which can also be run by hand.",
            f"cd {shlex.quote(self.site.cwd)} || exit 3",
            *export_lines(env),
            "# DeepSpeed forwards variables with these prefixes unquoted; workers.env has them quoted instead.",
            'for name in ${!PYTHON*} ${!MLFLOW*} ${!MV2*} ${!UCX*} ${!NCCL*}; do unset "$name"; done',
            *(line for line in export_lines(self._own_path()) if line),
            f"exec {shell_lines(command)}",
        ]
        files = {
            SCRIPT: "\n".join(lines) + "\n",
            HOSTFILE: "".join(f"{host.name} slots={plan.workers_per_node}\n" for host in hosts),
            ENV_FILE: "".join(f"{name}={value}\n" for name, value in self._worker_environment(plan).items()),
        }
        return Rendered(files, ("bash", str(folder / SCRIPT)), start=" ".join(map(shlex.quote, command)))

    def submit(self, plan: Plan) -> int:
        """Check every host, then train in the foreground.

        Returns:
            The exit code of the run.

        Raises:
            MachineError: If pdsh is missing, or with one problem for each host that cannot run workers.
        """
        launch = _launch(plan.config)
        if shutil.which("pdsh") is None:
            rule = "the program pdsh is not installed; DeepSpeed's launcher for several hosts requires it"
            raise MachineError.of("launch", rule, "run `apt-get install pdsh`, or install your system's pdsh package")
        hosts = read_hostfile(launch.hostfile)[: plan.nodes]
        problems = check_hosts(
            hosts,
            python=self.site.python,
            cwd=self.site.cwd,
            run_dir=plan.run_dir,
            port=launch.master_port,
            interface_given="GLOO_SOCKET_IFNAME" in self.site.environment,
        )
        if problems:
            raise MachineError(*problems)
        rendered = self.render(plan)
        write_rendered(plan, rendered)
        # DeepSpeed's front end kills the workers of all hosts when it receives a signal.
        return restarts.run(plan, rendered, sweep=lambda: sweep_hosts(hosts, plan.run_file), by_file=True)

    def _own_path(self) -> dict[str, str]:
        """Return PYTHONPATH for the launcher itself, because the script unsets it; only if it needs no quoting."""
        path = self.site.environment.get("PYTHONPATH", "")
        return {"PYTHONPATH": path} if path and PLAIN.match(path) else {}

    def _worker_environment(self, plan: Plan) -> dict[str, str]:
        """Return the environment of the workers, escaped for the double quotes that DeepSpeed puts around values."""
        given = {name: value for name, value in self.site.environment.items() if name != "PDSH_SSH_ARGS_APPEND"}
        escaped = {name: _escape(value) for name, value in given.items()}
        if "OMP_NUM_THREADS" not in escaped:
            workers = plan.workers_per_node
            # The shell of each host evaluates this expression with its own number of cores.
            escaped["OMP_NUM_THREADS"] = f"$(($(nproc) >= {workers} ? $(nproc) / {workers} : 1))"
        return escaped


def _escape(value: str) -> str:
    """Escape a value for double quotes in a shell, and `%` for pdsh."""
    if PLAIN.match(value):
        return value
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def _launch(config: RunConfig) -> HostfileConfig:
    assert isinstance(config.launch, HostfileConfig)
    return config.launch
