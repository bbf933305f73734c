"""Workers on the hosts of a hostfile, by DeepSpeed's own multi-node launcher over pdsh and ssh."""

from __future__ import annotations

import re
import shlex
import shutil

from ..config.launch import HostfileConfig
from ..config.plan import Plan
from ..config.run import RunConfig
from ..errors import MachineError, Problem, RequestError
from . import process
from .environ import Site, export_lines
from .hosts import check_hosts, choose_hosts, read_hostfile, sweep_hosts
from .launcher import WORKER_MODULE, Rendered, shell_lines, write_rendered

SCRIPT, HOSTFILE, ENV_FILE = "launch.sh", "hostfile", "workers.env"
PLAIN = re.compile(r"^[\w@+=:,./-]+$")  # what no shell changes, nor pdsh, which replaces % words
# A host that falls silent would be waited for without end.
KEEP_ALIVE = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"


class HostfileLauncher:
    """Launches over ssh, in the foreground."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def resolve(self, config: RunConfig) -> tuple[int, int]:
        """Nodes and workers a node, from the hostfile.

        Raises:
            RequestError: the hostfile is wrong or too small, or a path has characters that a remote shell would change.
        """
        launch = _launch(config)
        taken, workers = choose_hosts(read_hostfile(launch.hostfile), launch.nodes, launch.workers_per_node)
        # DeepSpeed pastes these into a command for a remote shell as they are.
        paths = {"output_dir": config.output_dir, "current folder": self.site.cwd, "python": self.site.python}
        pasted = {**paths, "launch.master_addr": launch.master_addr or "x"}
        problems = [
            Problem(key, f"{value!r} has characters that a remote shell would change", "use letters, digits and ._-/")
            for key, value in pasted.items()
            if not PLAIN.match(value)
        ]
        if problems:
            raise RequestError(*problems)
        return len(taken), workers

    def render(self, plan: Plan) -> Rendered:
        """`launch.sh`, the hostfile of the hosts that are used, and the workers' environment."""
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
            env["DS_ACCELERATOR"] = "cpu"  # of the launcher here; each host's workers find their own
        lines = [
            "#!/bin/bash",
            f"# Trains {plan.config.run_name} on {plan.nodes} hosts with {plan.workers_per_node} workers each. Run by",
            "# `dist-ft train`, which looks at every host first; can be run by hand.",
            f"cd {shlex.quote(self.site.cwd)} || exit 3",
            *export_lines(env),
            "# DeepSpeed hands on what begins so, and pastes it into a command unquoted; workers.env has it quoted.",
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
        """Look at every host, then train in the foreground; returns the run's exit code.

        Raises:
            MachineError: pdsh is missing, or a host cannot run workers, with the way out for each.
        """
        launch = _launch(plan.config)
        if shutil.which("pdsh") is None:
            rule = "DeepSpeed's launcher for several hosts needs the program pdsh on this machine"
            raise MachineError.of("launch", rule, "apt-get install pdsh (or your system's package of that name)")
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
        return process.run(rendered, plan.run_dir, sweep=lambda: sweep_hosts(hosts, plan.run_file))

    def _own_path(self) -> dict[str, str]:
        """PYTHONPATH again, for the launcher itself, where it is harmless."""
        path = self.site.environment.get("PYTHONPATH", "")
        return {"PYTHONPATH": path} if path and PLAIN.match(path) else {}

    def _worker_environment(self, plan: Plan) -> dict[str, str]:
        """What workers elsewhere need, escaped for the double quotes that DeepSpeed puts around it."""
        given = {name: value for name, value in self.site.environment.items() if name != "PDSH_SSH_ARGS_APPEND"}
        escaped = {name: _escape(value) for name, value in given.items()}
        if "OMP_NUM_THREADS" not in escaped:
            workers = plan.workers_per_node
            escaped["OMP_NUM_THREADS"] = f"$(($(nproc) >= {workers} ? $(nproc) / {workers} : 1))"  # of that host
        return escaped


def _escape(value: str) -> str:
    """A value as it must stand between double quotes in a shell, behind pdsh's own replacement of %."""
    if PLAIN.match(value):
        return value
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def _launch(config: RunConfig) -> HostfileConfig:
    assert isinstance(config.launch, HostfileConfig)
    return config.launch
