"""Launcher for SLURM: render `job.sbatch`, check it with `sbatch --test-only`, and submit it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...checks.batch import AUTO
from ...config.launch import SlurmConfig
from ...config.plan import EXIT_FILE, JOB_FILE, LOG_DIR, Plan
from ...config.run import RunConfig
from ...errors import MachineError, Problem, RequestError
from ..launcher import GPUS, Job, Rendered, Workers, write_rendered
from ..machine.environ import Site, child_environment
from .queue import has_gpus
from .script import container_mounts, read_template, render_script, requeues, slurm_config, step_words

SCRIPT = "job.sbatch"
OPTION = re.compile(r"^[a-z][a-z0-9-]*$")
# sbatch options that the plan sets; a second value in launch.sbatch would make the job differ from the plan.
OURS = {
    "nodes": "launch.nodes",
    "ntasks-per-node": "launch.workers_per_node",
    "gpus-per-node": "launch.gpus_per_node",
    "cpus-per-task": "launch.cpus_per_task",
    "mem": "launch.mem",
    "time": "launch.time",
    "partition": "launch.partition",
    "account": "launch.account",
    "qos": "launch.qos",
    "constraint": "launch.constraint",
    "job-name": "run_name",
    "output": "output_dir",
    "error": "output_dir",
    "open-mode": "output_dir",
    "ntasks": "launch.workers_per_node",
    "export": "launch.setup",
    "wrap": "launch.setup",
    "array": "run_name",
    "chdir": "output_dir",
    "requeue": "launch.requeue",
    "no-requeue": "launch.requeue",
    "signal": "train.stop_before_s",
}
LINES = ("mem", "time", "partition", "account", "qos", "constraint", "container", "container_python")
PLACES = {
    *("run_name", "nodes", "workers", "world_size", "directives", "cwd", "setup", "run_dir", "requeue", "port"),
    *("port_may_change", "threads", "step", "command"),
}


class SlurmLauncher:
    """Submit runs to SLURM."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def resolve(self, config: RunConfig, origins: Mapping[str, str]) -> Workers:
        """Return the workers as configured, with the number of GPUs of a node that the job asks for.

        GPUs of clusters are taken to compute in bfloat16 (Ampere and later).

        Raises:
            RequestError: If an sbatch option is unknown or set by the plan, a value has several lines, the template
                cannot train, or a path cannot be mounted into the container.
        """
        launch = slurm_config(config)
        problems = [
            *option_problems(launch),
            *template_problems(launch),
            *container_problems(launch, Path(config.output_dir), self.site),
        ]
        if launch.requeue is True and config.train.resume != "auto":
            rule = f"a requeued job would not go on where it stopped, because train.resume={config.train.resume}"
            problems.append(Problem("launch.requeue", rule, "remove train.resume, or set launch.requeue=false"))
        if problems:
            raise RequestError(*problems)
        if launch.gpus_per_node is None:
            launch, reason = settle_gpus(launch)
            config = config.model_copy(update={"launch": launch})
            origins = {**origins, GPUS: f"{AUTO}: {reason}"}
        return Workers(config, origins, launch.nodes, launch.workers_per_node, bool(launch.gpus_per_node))

    def render(self, plan: Plan) -> Rendered:
        """Render `job.sbatch`."""
        command = ("sbatch", "--parsable", str(plan.run_dir / SCRIPT))
        start = f"srun {shlex.join(step_words(plan, self.site))}"
        launch, again = slurm_config(plan.config), requeues(plan.config)
        settled = (
            (launch.requeue == "auto", "requeue", "goes on after an interruption" if again else "false (train.resume)"),
            (launch.master_port == "auto", "master_port", "20000 + the last four digits of the job's id, if free"),
        )
        notes = tuple(f"launch.{key} → {value}" for is_auto, key, value in settled if is_auto)
        return Rendered({SCRIPT: render_script(plan, self.site)}, command, start=start, notes=notes)

    def submit(self, plan: Plan) -> Job:
        """Write the job script, check it with `sbatch --test-only`, and submit it.

        Raises:
            MachineError: If sbatch is not installed, or SLURM rejects the job; with SLURM's message.
        """
        if shutil.which("sbatch") is None:
            raise MachineError.of("launch=slurm", "sbatch is not installed on this machine", "submit from a login node")
        rendered = self.render(plan)
        write_rendered(plan, rendered)
        script = str(plan.run_dir / SCRIPT)
        _sbatch(["sbatch", "--test-only", script])
        identity = _sbatch(list(rendered.command)).strip().partition(";")[0]
        (plan.run_dir / EXIT_FILE).unlink(missing_ok=True)
        (plan.run_dir / JOB_FILE).write_text(json.dumps({"job": identity}), encoding="utf-8")
        log = plan.run_dir / LOG_DIR / f"job-{identity}.log"
        return Job(identity, f"tail -F {shlex.quote(str(log))}", log)


def settle_gpus(launch: SlurmConfig) -> tuple[SlurmConfig, str]:
    """Return the configuration with the number of GPUs of a node, and the reason.

    It is a GPU per worker, except in a partition without GPUs, where SLURM would reject the request.
    """
    if has_gpus(launch.partition) is False:
        return launch.model_copy(update={"gpus_per_node": 0}), "no node has GPUs"
    return launch.model_copy(update={"gpus_per_node": launch.workers_per_node}), "one per worker"


def option_problems(launch: SlurmConfig) -> Iterator[Problem]:
    """Yield the problems of options of sbatch."""
    for name, value in launch.sbatch.items():
        where = f"launch.sbatch.{name}"
        if not OPTION.match(name):
            yield Problem(where, "is not the long name of an sbatch option", "see `man sbatch`")
        elif name in OURS:
            yield Problem(where, "is set by the plan", f"set {OURS[name]} instead")
        elif not value.isprintable():
            yield Problem(where, "contains line breaks or control characters", "write it on one line")
    for key in LINES:
        if not str(getattr(launch, key) or "").isprintable():
            yield Problem(f"launch.{key}", "contains line breaks or control characters", "write it on one line")


def template_problems(launch: SlurmConfig) -> Iterator[Problem]:
    """Yield the problems of the template: a job without its directives or its command would not train."""
    try:
        template = read_template(launch)
    except (OSError, UnicodeDecodeError) as error:
        yield Problem("launch.template", f"{launch.template} cannot be read: {error}", "name a batch script")
        return
    known = ", ".join(f"@{{{name}}}" for name in sorted(PLACES))
    for name in sorted(template.names - PLACES):
        yield Problem("launch.template", f"{launch.template}: @{{{name}}} is unknown", f"known: {known}")
    if not template.template.startswith("#!"):
        yield Problem("launch.template", f"{launch.template} has no first line `#!/bin/bash`", "sbatch requires it")
    if "directives" not in template.names:
        yield Problem("launch.template", f"{launch.template} does not contain @{{directives}}", "write it on a line")
    if not template.names & {"step", "command"}:
        rule = f"{launch.template} contains neither @{{step}} nor @{{command}}, so it starts no worker"
        yield Problem("launch.template", rule, "write a line with `srun @{step}`")


def container_problems(launch: SlurmConfig, run_dir: Path, site: Site) -> Iterator[Problem]:
    """Yield the problems of the container: an image of the other runtime, and paths that a list cannot hold."""
    if launch.container is None:
        return
    if launch.container.endswith(".sif") and launch.container_runtime != "apptainer":
        rule = f"{launch.container} is an image of Apptainer"
        yield Problem("launch.container_runtime", rule, "set launch.container_runtime=apptainer")
    if launch.container.endswith(".sqsh") and launch.container_runtime != "pyxis":
        rule = f"{launch.container} is an image of Enroot"
        yield Problem("launch.container_runtime", rule, "set launch.container_runtime=pyxis")
    for mount in container_mounts(launch, run_dir, site):
        if not mount.startswith("/") or "," in mount or not mount.isprintable():
            rule = f"{mount!r} cannot be mounted: it is not an absolute path, or contains a comma"
            yield Problem("launch.container_mounts", rule, "write PATH, HOST_PATH:PATH or HOST_PATH:PATH:ro")
    for path in (site.cwd, str(run_dir)):
        if ":" in path:
            yield Problem("launch.container", f"{path} contains a colon and cannot be mounted", "use another folder")


def _sbatch(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, env=child_environment({}), check=False)
    if run.returncode:
        said = run.stderr.strip() or run.stdout.strip() or f"exit code {run.returncode}"
        script = Path(command[-1])
        raise MachineError.of(str(script), f"SLURM rejects the job: {said}", "correct the launch.* keys (see `sinfo`)")
    return run.stdout
