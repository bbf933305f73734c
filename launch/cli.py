"""Entry point of the command line, `dist-ft COMMAND`.

Imports that take long are made inside the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .guide import explain
from .guide.usage import CONFIG_WORDS, RUN_WORDS, Command, build_parser, refuse_flags
from .machine.environ import is_completing

if TYPE_CHECKING:
    from ..config.plan import Plan
    from ..config.run import RunConfig
    from .launcher import Launcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    User errors are printed without a traceback; an unexpected exception is a bug and is not caught.
    """
    from ..errors import DistFtError

    parser = build_parser(COMMANDS)
    if is_completing():
        from .guide.completion import complete

        complete(parser)
    try:
        options, more = parser.parse_known_args(arguments)
        refuse_flags(f"dist-ft {options.command}", more)
        if more and "words" not in options:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        if more:  # argparse takes words only up to the first option after them
            options.words = [*options.words, *more]
        code: int = options.run(options)
        return code
    except DistFtError as error:
        from .process import show_error

        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("dist-ft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # for example `dist-ft schema | head`
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def train(options: argparse.Namespace) -> int:
    """Train on this machine or on the hosts of a hostfile, and return the exit code of the run."""
    from ..errors import RequestError
    from ..process.owner import command_owns
    from .jobs import keep_exit
    from .process import nothing_started

    with nothing_started():
        plan, launcher = _plan(options)
        if plan.config.launch.name == "slurm":
            way_out = "use `dist-ft submit launch=slurm …`"
            raise RequestError.of("launch=slurm", "is not supported by `dist-ft train`", way_out)
        with command_owns(plan.run_dir):
            _write(plan)
            print(f"{plan.config.run_name}: {_workers(plan)} → {_short(plan.run_dir)}", flush=True)
            return keep_exit(plan.run_dir, lambda: _prepare(plan) or _in_foreground(plan, launcher))


def _in_foreground(plan: Plan, launcher: Launcher) -> int:
    code = launcher.submit(plan)
    if code and plan.config.track.report:
        from ..track.report import write_last

        write_last(plan.run_dir)  # rank 0 may have been killed
    assert isinstance(code, int), "a launcher in the foreground returns an exit code"
    return code


def sweep(options: argparse.Namespace) -> int:
    """Run a hyperparameter search, one training run for each trial."""
    from .search.command import run_sweep

    return run_sweep(options.words, options.config_dir, _checker(options), _train_words(options))


def stages(options: argparse.Namespace) -> int:
    """Train several stages, each starting from the model that the previous stage exported."""
    from pathlib import Path

    from .process import run_module
    from .stages import read_stages, run_stages

    def export(words: Sequence[str]) -> int:
        return run_module(["dist_ft.launch.cli", "export", *words])

    def train(words: Sequence[str]) -> int:
        return run_module([*_train_words(options), *words])

    return run_stages(read_stages(Path(options.file), options.words), _checker(options), train, export)


def _checker(options: argparse.Namespace) -> Callable[[Sequence[str]], RunConfig]:
    """Return the function with which `sweep` and `stages` check the arguments of a run."""

    def check(words: Sequence[str]) -> RunConfig:
        return _plan(argparse.Namespace(words=words, config_dir=options.config_dir, command="train"))[0].config

    return check


def _train_words(options: argparse.Namespace) -> list[str]:
    """Return the module and first arguments with which `sweep` and `stages` train a run."""
    own_dir = ["--config-dir", options.config_dir] if options.config_dir else []
    return ["dist_ft.launch.cli", "train", *own_dir]


def submit(options: argparse.Namespace) -> int:
    """Submit a run to SLURM."""
    plan, launcher = _plan(options)
    from ..errors import RequestError

    if plan.config.launch.name != "slurm":
        way_out = "use `dist-ft train`, or set launch=slurm"
        raise RequestError.of(f"launch={plan.config.launch.name}", "is not supported by `dist-ft submit`", way_out)
    from ..process.owner import command_owns
    from .launcher import Job

    with command_owns(plan.run_dir):
        _write(plan)
        if code := _prepare(plan):
            return code
        job = launcher.submit(plan)
    assert isinstance(job, Job), "a scheduler returns a job"
    print(f"job {job.identity}: {plan.config.run_name}, {_workers(plan)}")
    print(f"  follow   {job.follow}")
    print(f"  workers  {_short(plan.run_dir)}/logs/rank-<r>.log")
    print(
        f"  status   dist-ft status run={_short(plan.run_dir)}        cancel: dist-ft cancel run={_short(plan.run_dir)}"
    )
    return 0


def plan(options: argparse.Namespace) -> int:
    """Show the plan of a run without writing into its folder or starting a worker."""
    from ..process.options import PlanOptions, read_words, split_words

    own, options.words = split_words(PlanOptions, options.words)
    show = read_words(PlanOptions, own).show
    made, launcher = _plan(options)
    if show == "config":
        from .show import config_text

        print(config_text(made, options.words, options.config_dir), end="")
        return 0
    from .show import show_plan

    show_plan(made, launcher.render(made))
    return 0 if options.brief else _module("dist_ft.inspect.model", made, [])


def data(options: argparse.Namespace) -> int:
    """Show rows as the model sees them, after rendering and tokenization."""
    from ..process.options import RowsOptions, read_words, split_words
    from .planning import plan_data

    own, rest = split_words(RowsOptions, options.words)
    read_words(RowsOptions, own)  # before the slow imports of the module, which reads them again
    made = plan_data(rest, options.config_dir)
    return _module("dist_ft.inspect.rows", made, own)


def outcome(options: argparse.Namespace) -> int:
    """Run `eval`, `generate` or `export` on the folder of a run."""
    from ..config.plan import read_plan
    from ..errors import RequestError
    from ..process import options as kinds
    from .process import run_module

    runs = [word.partition("=")[2] for word in options.words if word.startswith("run=")]
    if len(runs) != 1 or not runs[0]:
        raise RequestError.of("run", "must be given exactly once", f"use `dist-ft {options.command} run=runs/NAME`")
    module = {
        "eval": "dist_ft.assess.evaluate",
        "generate": "dist_ft.assess.generate",
        "export": "dist_ft.export.merge",
    }[options.command]
    # reports a wrong folder or word before the slow imports of the module, which reads the words again
    read_plan(runs[0])
    rest = [word for word in options.words if not word.startswith("run=")]
    kinds.read_words(getattr(kinds, options.own_words), rest)
    # Use the given path and not the one in the plan, because the folder may have been moved since.
    return run_module([module, _run_file(runs[0]), *rest])


def report(options: argparse.Namespace) -> int:
    """Write the report of a run, or of several runs side by side."""
    from pathlib import Path

    from ..errors import RequestError
    from ..process.options import ReportOptions, read_words
    from ..report.write import write_report

    runs = [Path(word.partition("=")[2]) for word in options.words if word.startswith("run=")]
    if not runs:
        raise RequestError.of("run", "is missing", "use `dist-ft report run=runs/A`, or several runs to compare them")
    own = read_words(ReportOptions, [word for word in options.words if not word.startswith("run=")])
    print(_short(write_report(runs, Path(own.out) if own.out else None)))
    return 0


def jobs(options: argparse.Namespace) -> int:
    """Run `status`, `logs` or `cancel` on the folder of a run."""
    from .jobs import run_jobs_command

    return run_jobs_command(options.command, options.words)


def doctor(options: argparse.Namespace) -> int:
    """Diagnose this machine."""
    from .process import run_module

    return run_module(["dist_ft.diagnosis.doctor", *options.words])


# Command → what runs it, one sentence on what it does, the words that it takes, and the class of its own words.
COMMANDS: dict[str, Command] = {
    "init": (explain.init, "write a first configuration file (asks, or model=… data=… out=FILE)", None, "InitOptions"),
    "train": (train, "train on this machine, or on the hosts of a hostfile", CONFIG_WORDS, None),
    "submit": (submit, "submit a run to SLURM", CONFIG_WORDS, None),
    "sweep": (sweep, "search hyperparameters: KEY=choice(A,B) or KEY=interval(LOW,HIGH)", CONFIG_WORDS, "SweepOptions"),
    "stages": (
        stages,
        "train several stages, each starting from the model of the previous one",
        CONFIG_WORDS,
        None,
    ),
    "plan": (plan, "show the plan of a run and start nothing", CONFIG_WORDS, "PlanOptions"),
    "data": (data, "show rows as the model sees them, with supervised tokens in color", CONFIG_WORDS, "RowsOptions"),
    "eval": (
        outcome,
        "evaluate the model of a run on its validation or test data",
        RUN_WORDS,
        "EvaluateOptions",
    ),
    "generate": (outcome, "answer a prompt, or chat, with the model of a run", RUN_WORDS, "GenerateOptions"),
    "export": (outcome, "write the model of a run as a Hugging Face folder", RUN_WORDS, "ExportOptions"),
    "report": (
        report,
        "write a page with the curves of a run, or of several runs side by side",
        RUN_WORDS,
        "ReportOptions",
    ),
    "status": (jobs, "show how a run stands, or list all runs", None, "StatusOptions"),
    "logs": (jobs, "show the output of a run", None, "LogsOptions"),
    "cancel": (jobs, "stop a run with a checkpoint", None, "CancelOptions"),
    "list": (explain.list_choices, "list the choices of a group, or of all groups", None, None),
    "help": (explain.help_key, "explain a key: its type, default and meaning, and which choices have it", None, None),
    "doctor": (doctor, "check versions, devices, kernels, disk and network of this machine", None, None),
    "schema": (explain.schema, "print the JSON Schema of a configuration file, for editors", None, None),
    "completion": (explain.completion, "print the code that enables completion in a shell", None, None),
}


def _plan(options: argparse.Namespace) -> tuple[Plan, Launcher]:
    """Make the plan of a run, and check this machine for commands that start it."""
    from ..checks.machine import check_machine
    from ..errors import MachineError
    from .machine.environ import find_site, variable
    from .planning import plan_run

    made, launcher = plan_run(options.words, options.config_dir, find_site())
    if options.command in ("train", "submit") and (faults := check_machine(made.config, variable)):
        raise MachineError(*faults)
    return made, launcher


def _write(made: Plan) -> None:
    from ..config.plan import write_plan
    from .show import adapted_lines, left_out_lines

    for line in (*left_out_lines(made), *adapted_lines(made)):
        print(f"dist-ft: {line}")
    write_plan(made)


def _prepare(made: Plan) -> int:
    """Convert the model and tokenize the data unless the cache has them; return an exit code."""
    from ..data.store.identity import is_prepared
    from ..errors import Stopped
    from ..process.stop import AGAIN, stop_signal
    from .process import run_module

    if is_prepared(made.config):
        return 0
    code = run_module(["dist_ft.prepare", str(made.run_file)])
    if cause := stop_signal(code):
        raise Stopped.of(cause, "nothing was trained yet; what was prepared is in the cache", AGAIN)
    return code


def _module(module: str, made: Plan, words: list[str]) -> int:
    """Run a module on a plan in a temporary folder, so that nothing is written into the folder of the run."""
    import tempfile
    from pathlib import Path

    import yaml

    from .process import run_module

    with tempfile.TemporaryDirectory(prefix="dist-ft-") as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")
        return run_module([module, str(file), *words])


def _run_file(run: str) -> str:
    from pathlib import Path

    from ..config.plan import RUN_FILE

    path = Path(run)
    return str(path / RUN_FILE if path.is_dir() else path)


def _workers(made: Plan) -> str:
    where = "" if made.nodes == 1 else f" on {made.nodes} nodes"
    return f"{made.world_size} worker{'s' * (made.world_size > 1)}{where}, {made.config.engine.name}"


def _short(path: object) -> str:
    import os

    shown = os.path.relpath(str(path))
    return str(path) if shown.startswith("..") else shown


if __name__ == "__main__":
    sys.exit(main())
