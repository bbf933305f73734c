"""The batch script of a plan: options of sbatch, the words of `srun`, and whether the job starts again."""

from __future__ import annotations

import math
import re
import shlex
import string
from pathlib import Path

from ...config.launch import SlurmConfig
from ...config.plan import LOG_DIR, Plan
from ...config.run import RunConfig
from ..composition.paths import SLURM_DIR
from ..launcher import WORKER_MODULE
from ..machine.environ import Site

TEMPLATE = SLURM_DIR / "train.sbatch"
# Ports below those that Linux gives to outgoing connections (32768 and up).
PORT_OF_JOB = "$((20000 + SLURM_JOB_ID % 10000))"
SIGNAL_FROM_S = 60  # SLURM sends the signal up to 60 s early, which would take most of the time of a short job
TIME_LIMIT = re.compile(r"^(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})$")
# torchrun reads options from PET_* too, and only the task knows the number of its node.
RENDEZVOUS = 'export PET_NODE_RANK=$SLURM_NODEID PET_MASTER_ADDR=$MASTER_ADDR PET_MASTER_PORT=$MASTER_PORT; exec "$@"'


class Template(string.Template):
    """Template with placeholders of the form `@{name}`; `$` and all other uses of `@` are left to the shell."""

    delimiter = "@"
    pattern = r"@\{(?P<braced>[a-z_]+)\}|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!))"  # type: ignore[assignment]  # compiled by the base

    @property
    def names(self) -> set[str]:
        """The names of its placeholders."""
        return {match["braced"] for match in self.pattern.finditer(self.template)}  # type: ignore[attr-defined]


def read_template(launch: SlurmConfig) -> Template:
    """Return the template of `launch.template`, by default the one of this package."""
    return Template(Path(launch.template or TEMPLATE).read_text(encoding="utf-8"))


def render_script(plan: Plan, site: Site) -> str:
    """Return the batch script of a plan."""
    launch = slurm_config(plan.config)
    return read_template(launch).substitute(places(plan, site))


def places(plan: Plan, site: Site) -> dict[str, object]:
    """Return the values of the placeholders of templates, quoted for the shell."""
    launch = slurm_config(plan.config)
    workers = plan.workers_per_node
    cpus = "${SLURM_CPUS_PER_TASK:-$(nproc)}"
    share = f"$(({cpus} >= {workers} ? {cpus} / {workers} : 1))"
    return {
        "run_name": plan.config.run_name,
        "nodes": plan.nodes,
        "workers": workers,
        "world_size": plan.world_size,
        "directives": "\n".join(directives(plan)),
        "cwd": shlex.quote(site.cwd),
        "setup": "".join(f"{line}\n" for line in launch.setup),
        "run_dir": shlex.quote(str(plan.run_dir)),
        "requeue": int(requeues(plan.config)),
        "port": PORT_OF_JOB if launch.master_port == "auto" else launch.master_port,
        "port_may_change": int(launch.master_port == "auto"),
        "threads": share if launch.tasks_per_node else f"${{SLURM_CPUS_PER_TASK:-{share.replace(cpus, '$(nproc)')}}}",
        "step": shlex.join(step_words(plan, site)),
        "command": shlex.join(step_command(plan, site)),
    }


def directives(plan: Plan) -> list[str]:
    """Return the `#SBATCH` lines of a plan."""
    launch = slurm_config(plan.config)
    log = str(plan.run_dir / LOG_DIR / "job-%j.log").replace(str(plan.run_dir), str(plan.run_dir).replace("%", "%%"))
    options: dict[str, object] = {
        "job-name": plan.config.run_name,
        "output": log,
        "open-mode": "append",  # a requeued job continues the same log
        "nodes": plan.nodes,
        "ntasks-per-node": launch.tasks_per_node or plan.workers_per_node,
        "gpus-per-node": launch.gpus_per_node or None,
        "cpus-per-task": launch.cpus_per_task,
        "mem": launch.mem,
        "time": None if launch.time is None else str(launch.time),
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


def step_words(plan: Plan, site: Site) -> list[str]:
    """Return the words of `srun`: its options, and the command of each task, in a container if there is one."""
    launch = slurm_config(plan.config)
    tasks = launch.tasks_per_node or plan.workers_per_node
    words = ["--kill-on-bad-exit=1", f"--ntasks={plan.nodes * tasks}", f"--ntasks-per-node={tasks}"]
    command = step_command(plan, site)
    if launch.container is None:
        return [*words, *command]
    mounts = container_mounts(launch, plan.run_dir, site)
    if launch.container_runtime == "apptainer":
        program = ["apptainer", "exec", "--nv", f"--bind={','.join(mounts)}", f"--pwd={site.cwd}"]
        return [*words, *program, launch.container, *command]
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    words += [f"--container-image={launch.container}", f"--container-mounts={','.join(pairs)}"]
    return [*words, f"--container-workdir={site.cwd}", *command]


def step_command(plan: Plan, site: Site) -> list[str]:
    """Return the command of a task: a worker, or with `launch.tasks_per_node=1` a torchrun that starts them."""
    launch = slurm_config(plan.config)
    python = site.python if launch.container is None else launch.container_python
    if launch.tasks_per_node is None:
        return [python, "-u", "-m", WORKER_MODULE, str(plan.run_file)]
    agent = [
        *(python, "-u", "-m", "dist_ft.launch.torchrun"),
        *(f"--nnodes={plan.nodes}", f"--nproc-per-node={plan.workers_per_node}"),
        *("-m", WORKER_MODULE, str(plan.run_file)),
    ]
    return ["bash", "-c", RENDEZVOUS, "torchrun", *agent]


def container_mounts(launch: SlurmConfig, run_dir: Path, site: Site) -> list[str]:
    """Return the mounts of a container: the working directory, the folder of the run, and those of the user."""
    return list(dict.fromkeys([site.cwd, str(run_dir), *launch.container_mounts]))


def requeues(config: RunConfig) -> bool:
    """Return whether a job that was interrupted by SLURM starts again."""
    requeue = slurm_config(config).requeue
    return config.train.resume == "auto" if requeue == "auto" else requeue


def early_signal(config: RunConfig) -> str | None:
    """Return the value of `--signal` of a job that starts again; None if it would take most of the job's time.

    Workers stop before the time limit that is set when they start. The signal tells them of a limit that was changed
    since, and of preemptions where the site's PreemptParameters have `send_user_signal`.
    """
    limit_s = time_limit_s(slurm_config(config).time)
    before_s = config.train.seconds_before(math.inf if limit_s is None else limit_s)
    return f"USR1@{before_s:.0f}" if requeues(config) and before_s >= SIGNAL_FROM_S else None


def time_limit_s(limit: str | int | None) -> float | None:
    """Return the seconds of a time limit in SLURM's format; None for no limit, or a format that is left to SLURM."""
    match = TIME_LIMIT.match(str(limit or ""))
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:  # M, M:S, H:M:S
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    return float(((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def slurm_config(config: RunConfig) -> SlurmConfig:
    """Return the keys of `launch=slurm`."""
    assert isinstance(config.launch, SlurmConfig)
    return config.launch
