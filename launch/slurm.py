"""Launcher for SLURM: render `job.sbatch` from slurm/train.sbatch, check it with `sbatch --test-only`, submit it."""

from __future__ import annotations

import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

from ..config.launch import SlurmConfig
from ..config.plan import Plan
from ..config.run import RunConfig
from ..errors import MachineError, Problem, RequestError
from .composition.paths import SLURM_DIR
from .launcher import FAILURE_FILE, LOG_DIR, WORKER_MODULE, Job, Rendered, write_rendered
from .machine.environ import Site, child_environment

SCRIPT = "job.sbatch"
TEMPLATE = SLURM_DIR / "train.sbatch"
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
}


class Template(string.Template):
    """Template with placeholders of the form `@{name}`; `$` and all other uses of `@` are left to the shell."""

    delimiter = "@"
    pattern = r"@\{(?P<braced>[a-z_]+)\}|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!))"  # type: ignore[assignment]  # compiled by the base


class SlurmLauncher:
    """Submit runs to SLURM."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def resolve(self, config: RunConfig) -> tuple[int, int]:
        """Return the number of nodes and of workers on each node, as configured.

        Raises:
            RequestError: If an sbatch option is unknown or set by the plan, or a value has several lines.
        """
        launch = _launch(config)
        problems = []
        for name, value in launch.sbatch.items():
            where = f"launch.sbatch.{name}"
            if not OPTION.match(name):
                problems.append(Problem(where, "is not the long name of an sbatch option", "see `man sbatch`"))
            elif name in OURS:
                problems.append(Problem(where, "is set by the plan", f"set {OURS[name]} instead"))
            elif not value.isprintable():
                problems.append(Problem(where, "contains line breaks or control characters", "write it on one line"))
        problems += [
            Problem(f"launch.{key}", "contains line breaks or control characters", "write it on one line")
            for key in ("mem", "time", "partition", "account", "qos", "constraint")
            if not (getattr(launch, key) or "").isprintable()
        ]
        if problems:
            raise RequestError(*problems)
        return launch.nodes, launch.workers_per_node

    def has_bfloat16(self, config: RunConfig) -> bool:
        """Return whether the job asks for GPUs; those of clusters compute in bfloat16 (Ampere and later)."""
        return _launch(config).gpus_per_node != 0

    def render(self, plan: Plan) -> Rendered:
        """Render `job.sbatch`."""
        launch = _launch(plan.config)
        words = [self.site.python, "-u", "-m", WORKER_MODULE, str(plan.run_file)]
        start = " ".join(map(shlex.quote, words))
        workers = plan.workers_per_node
        text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            run_name=plan.config.run_name,
            nodes=plan.nodes,
            workers=workers,
            world_size=plan.world_size,
            directives="\n".join(directives(plan)),
            cwd=shlex.quote(self.site.cwd),
            setup="".join(f"{line}\n" for line in launch.setup),
            port=launch.master_port,
            threads=f"$(($(nproc) >= {workers} ? $(nproc) / {workers} : 1))",
            failure_file=shlex.quote(str(plan.run_dir / FAILURE_FILE)),
            launch=start,
        )
        return Rendered({SCRIPT: text}, ("sbatch", "--parsable", str(plan.run_dir / SCRIPT)), start=f"srun {start}")

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
        log = plan.run_dir / LOG_DIR / f"job-{identity}.log"
        return Job(identity, f"tail -F {shlex.quote(str(log))}", log)


def directives(plan: Plan) -> list[str]:
    """Return the `#SBATCH` lines of a plan."""
    launch = _launch(plan.config)
    log = str(plan.run_dir / LOG_DIR / "job-%j.log").replace(str(plan.run_dir), str(plan.run_dir).replace("%", "%%"))
    gpus = plan.workers_per_node if launch.gpus_per_node is None else launch.gpus_per_node
    options: dict[str, object] = {
        "job-name": plan.config.run_name,
        "output": log,
        "open-mode": "append",  # a requeued job continues the same log
        "nodes": plan.nodes,
        "ntasks-per-node": plan.workers_per_node,
        "gpus-per-node": gpus or None,
        "cpus-per-task": launch.cpus_per_task,
        "mem": launch.mem,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        **launch.sbatch,
    }
    lines = []
    for name, value in options.items():
        if value is not None:
            lines.append(f"#SBATCH --{name}={shlex.quote(str(value))}" if value != "" else f"#SBATCH --{name}")
    return lines


def _sbatch(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, env=child_environment({}), check=False)
    if run.returncode:
        said = run.stderr.strip() or run.stdout.strip() or f"exit code {run.returncode}"
        script = Path(command[-1])
        raise MachineError.of(str(script), f"SLURM rejects the job: {said}", "correct the launch.* keys (see `sinfo`)")
    return run.stdout


def _launch(config: RunConfig) -> SlurmConfig:
    assert isinstance(config.launch, SlurmConfig)
    return config.launch
