"""Launcher for SLURM: render `job.sbatch` from slurm/train.sbatch, check it with `sbatch --test-only`, submit it."""

from __future__ import annotations

import math
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
from .launcher import LOG_DIR, WORKER_MODULE, Job, Rendered, write_rendered
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
    "requeue": "launch.requeue",
    "no-requeue": "launch.requeue",
    "signal": "train.stop_before_s",
}
# Ports below those that Linux gives to outgoing connections (32768 and up).
PORT_OF_JOB = "$((20000 + SLURM_JOB_ID % 10000))"
SIGNAL_FROM_S = 60  # SLURM sends the signal up to 60 s early, which would take most of the time of a short job
TIME_LIMIT = re.compile(r"^(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})$")


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
        if launch.requeue is True and config.train.resume != "auto":
            rule = f"a requeued job would not go on where it stopped, because train.resume={config.train.resume}"
            problems.append(Problem("launch.requeue", rule, "remove train.resume, or set launch.requeue=false"))
        if problems:
            raise RequestError(*problems)
        return launch.nodes, launch.workers_per_node

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
            run_dir=shlex.quote(str(plan.run_dir)),
            requeue=int(requeues(plan.config)),
            port=PORT_OF_JOB if launch.master_port == "auto" else launch.master_port,
            port_may_change=int(launch.master_port == "auto"),
            threads=f"$(($(nproc) >= {workers} ? $(nproc) / {workers} : 1))",
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
        "requeue" if requeues(plan.config) else "no-requeue": "",
        "signal": early_signal(plan.config),
        **launch.sbatch,
    }
    lines = []
    for name, value in options.items():
        if value is not None:
            lines.append(f"#SBATCH --{name}={shlex.quote(str(value))}" if value != "" else f"#SBATCH --{name}")
    return lines


def requeues(config: RunConfig) -> bool:
    """Return whether a job that was interrupted by SLURM starts again."""
    requeue = _launch(config).requeue
    return config.train.resume == "auto" if requeue == "auto" else requeue


def early_signal(config: RunConfig) -> str | None:
    """Return the value of `--signal` of a job that starts again; None if it would take most of the job's time.

    Workers stop before the time limit that is set when they start. The signal tells them of a limit that was changed
    since, and of preemptions where the site's PreemptParameters have `send_user_signal`.
    """
    limit_s = time_limit_s(_launch(config).time)
    before_s = config.train.seconds_before(math.inf if limit_s is None else limit_s)
    return f"USR1@{before_s:.0f}" if requeues(config) and before_s >= SIGNAL_FROM_S else None


def time_limit_s(text: str | None) -> float | None:
    """Return the seconds of a time limit in SLURM's format; None for no limit, or a format that is left to SLURM."""
    match = TIME_LIMIT.match(text or "")
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:  # M, M:S, H:M:S
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    return float(((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


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
