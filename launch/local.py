"""Launcher for this machine: a single process, torchrun (ddp, fsdp), or DeepSpeed's launcher (zero*)."""

from __future__ import annotations

import base64
import importlib.util
import json
import shlex
from collections.abc import Mapping

from ..config.launch import LocalConfig
from ..config.plan import Plan
from ..config.run import RunConfig
from ..errors import MachineError, RequestError
from . import restarts
from .launcher import WORKER_MODULE, Rendered, Workers, shell_lines, write_rendered
from .machine.environ import Site, export_lines
from .machine.ports import port_problem

SCRIPT = "launch.sh"
CPU_WORKERS = 2
FREE_PORT = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"


class LocalLauncher:
    """Start workers on this machine, in the foreground."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def resolve(self, config: RunConfig, origins: Mapping[str, str]) -> Workers:
        """Return the workers, all on one node; the default is one worker per GPU, or two without GPUs.

        Raises:
            RequestError: If there are more workers than GPUs.
        """
        launch = _launch(config)
        gpus = len(self.site.devices)
        workers = gpus or CPU_WORKERS if launch.workers_per_node == "auto" else launch.workers_per_node
        if gpus and workers > gpus:
            rule = f"{workers} workers, but {gpus} GPUs are visible"
            raise RequestError.of("launch.workers_per_node", rule, f"set launch.workers_per_node={gpus} or fewer")
        return Workers(config, origins, 1, workers, self.site.has_bfloat16)

    def render(self, plan: Plan) -> Rendered:
        """Render `launch.sh`, whose process is replaced by that of the launcher (`exec`)."""
        command, port_line = self._command(plan)
        env = self._environment(plan)
        lines = [
            "#!/bin/bash",
            f"# Trains {plan.config.run_name}: {_count(plan.world_size)} on this machine, {plan.config.engine.name}.",
            "# `dist-ft train` runs this script and cleans up after a failure; it can also be run by hand.",
            f"cd {shlex.quote(self.site.cwd)} || exit 3",
            *export_lines(env),
            *port_line,
            f"exec {command}",
        ]
        start = command.replace(" \\\n ", "")
        return Rendered({SCRIPT: "\n".join(lines) + "\n"}, ("bash", str(plan.run_dir / SCRIPT)), start=start)

    def submit(self, plan: Plan) -> int:
        """Train in the foreground.

        Returns:
            The exit code of the run.

        Raises:
            MachineError: If the port is in use, or DeepSpeed is not installed.
        """
        launch = _launch(plan.config)
        if uses_deepspeed(plan) and importlib.util.find_spec("deepspeed") is None:
            rule = f"deepspeed is not installed; engine={plan.config.engine.name} requires it"
            raise MachineError.of("engine.name", rule, "run `pip install deepspeed`, or set engine=fsdp")
        if launch.port and plan.world_size > 1 and (problem := port_problem("launch.port", launch.port)):
            raise MachineError(problem)
        rendered = self.render(plan)
        write_rendered(plan, rendered)
        return restarts.run(plan, rendered)

    def _environment(self, plan: Plan) -> dict[str, str]:
        threads = self.site.environment.get("OMP_NUM_THREADS") or str(self.site.threads(plan.world_size))
        env = {"OMP_NUM_THREADS": threads}
        if not self.site.devices:
            env["DS_ACCELERATOR"] = "cpu"
        return env

    def _command(self, plan: Plan) -> tuple[str, list[str]]:
        """Return the shell command, and the script lines that must precede it."""
        python, run_file, workers = self.site.python, str(plan.run_file), plan.world_size
        port = _launch(plan.config).port
        if workers == 1:
            return shell_lines([python, "-u", "-m", WORKER_MODULE, run_file]), []
        if not uses_deepspeed(plan):
            words = [
                *(python, "-m", "dist_ft.launch.torchrun"),
                *("--nnodes=1", f"--nproc-per-node={workers}"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={plan.config.run_name}"),
                "--local-addr=127.0.0.1",  # the name of this machine may not resolve
                *("-m", WORKER_MODULE, run_file),
            ]
            return shell_lines(words), []
        # Use the part of DeepSpeed's launcher that starts the workers of one machine. Its front end (`deepspeed`)
        # overrides CUDA_VISIBLE_DEVICES, and leaves workers running when it is terminated.
        devices = list(self.site.devices[:workers]) or list(range(workers))
        world = {"localhost": devices}
        encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
        before = [f"# --world_info is {json.dumps(world)}"]
        if not port:
            before.append(f"port=$({shlex.quote(python)} -c {shlex.quote(FREE_PORT)}) || exit 3")
        words = [
            *(python, "-u", "-m", "dist_ft.launch.forward", "deepspeed.launcher.launch"),
            *(f"--world_info={encoded}", "--master_addr=127.0.0.1", f"--master_port={port or 'PORT'}"),
            *("--log_level=critical", "--no_local_rank", "--module", WORKER_MODULE, run_file),
        ]
        command = shell_lines(words)
        return (command if port else command.replace("--master_port=PORT", '--master_port="$port"')), before


def _count(workers: int) -> str:
    return "one worker" if workers == 1 else f"{workers} workers"


def uses_deepspeed(plan: Plan) -> bool:
    """Return whether the engine is a DeepSpeed engine (ZeRO 1-3)."""
    return plan.config.engine.name.startswith("zero")


def _launch(config: RunConfig) -> LocalConfig:
    assert isinstance(config.launch, LocalConfig)
    return config.launch
