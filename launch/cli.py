"""Entry point of the command line, `dist-ft COMMAND`.

Imports that take long are made inside the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.plan import Plan
    from ..config.run import RunConfig
    from .launcher import Launcher

CONFIG_EPILOG = """\
arguments:
  GROUP=CHOICE    select a file of conf/GROUP: model, task, data, method, engine, optim, track, launch, experiment
  KEY=VALUE       set a dotted key: method.r=8, train.max_steps=100, data.train=rows.jsonl
"""
RUN_EPILOG = """\
arguments:
  run=FOLDER      the folder of a run, for example run=runs/first
  KEY=VALUE       options of this command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    User errors are printed without a traceback; an unexpected exception is a bug and is not caught.
    """
    parser = _parser()
    options, after = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in after) or (after and "words" not in options):
        parser.error(f"unrecognized arguments: {' '.join(after)}")
    if after:  # argparse takes words only up to the first option after them
        options.words = [*options.words, *after]
    from ..errors import DistFtError

    try:
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
    from .sweep import read_words, sweep

    return sweep(read_words(options.words), *_many(options))


def stages(options: argparse.Namespace) -> int:
    """Train several stages, each starting from the model that the previous stage exported."""
    from pathlib import Path

    from .process import run_module
    from .stages import read_stages, run_stages

    def export(words: Sequence[str]) -> int:
        return run_module(["dist_ft.launch.cli", "export", *words])

    return run_stages(read_stages(Path(options.file), options.words), *_many(options), export)


def _many(options: argparse.Namespace) -> tuple[Callable[[Sequence[str]], RunConfig], Callable[[Sequence[str]], int]]:
    """Return the functions with which `sweep` and `stages` check the arguments of a run, and train it."""
    from .process import run_module

    def check(words: Sequence[str]) -> RunConfig:
        return _plan(argparse.Namespace(words=words, config_dir=options.config_dir, command="train"))[0].config

    def train(words: Sequence[str]) -> int:
        return run_module(["dist_ft.launch.cli", "train", *own_dir, *words])

    own_dir = ["--config-dir", options.config_dir] if options.config_dir else []
    return check, train


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
    from ..config.strict import Strict
    from ..errors import RequestError
    from ..process.options import EvaluateOptions, ExportOptions, GenerateOptions, read_words
    from .process import run_module

    runs = [word.partition("=")[2] for word in options.words if word.startswith("run=")]
    if len(runs) != 1 or not runs[0]:
        raise RequestError.of("run", "must be given exactly once", f"use `dist-ft {options.command} run=runs/NAME`")
    commands: dict[str, tuple[str, type[Strict]]] = {
        "eval": ("dist_ft.assess.evaluate", EvaluateOptions),
        "generate": ("dist_ft.assess.generate", GenerateOptions),
        "export": ("dist_ft.export.merge", ExportOptions),
    }
    module, kind = commands[options.command]
    # reports a wrong folder or word before the slow imports of the module, which reads the words again
    read_plan(runs[0])
    rest = [word for word in options.words if not word.startswith("run=")]
    read_words(kind, rest)
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


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON Schema of a configuration file."""
    from .composition.compose import list_groups
    from .composition.schema import file_schema

    print(json.dumps(file_schema(list_groups()), indent=2))
    return 0


def init(options: argparse.Namespace) -> int:
    """Write a first configuration file."""
    from .guide.init import init
    from .planning import plan_data

    return init(options.words, lambda words: plan_data(words, None))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ft",
        description="Fine-tune language models on one or several machines. A run that exits 0 trained what you meant.",
        epilog="exit codes: 0 success, 2 invalid request, 3 unsuitable environment, 4 training failed, "
        "75 stopped with a checkpoint (run the same command again to resume)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", train, "train on this machine, or on the hosts of a hostfile"),
        ("submit", submit, "submit a run to SLURM"),
        ("sweep", sweep, "search hyperparameters: KEY=choice(A,B) trials=20 metric=loss"),
        ("stages", stages, "train several stages, each starting from the model of the previous one"),
        ("plan", plan, "show the plan of a run and start nothing"),
        ("data", data, "show rows as the model sees them, with supervised tokens in color (rows=3)"),
    ):
        command = _command(commands, name, run, text, CONFIG_EPILOG)
        command.add_argument("--config-dir", metavar="DIR", help="folder with your own groups (DIR/model/mine.yaml)")
        if name == "stages":
            command.add_argument("file", metavar="FILE", help="YAML file that lists the stages, see the README")
        command.add_argument("words", nargs="*", metavar="KEY=VALUE")
        if name == "plan":
            command.add_argument("--brief", action="store_true", help="omit the tables of the model and the data")
    for name, text in (
        ("eval", "evaluate the model of a run on its validation or test data"),
        ("generate", "answer a prompt, or chat, with the model of a run (prompt='…')"),
        ("export", "write the model of a run as a Hugging Face folder"),
        ("status", "show how a run stands, or list all runs (runs=FOLDER)"),
        ("logs", "show the output of a run (follow=true, rank=R)"),
        ("cancel", "stop a run with a checkpoint (now=true: at once)"),
    ):
        run = jobs if name in ("status", "logs", "cancel") else outcome
        _command(commands, name, run, text, RUN_EPILOG).add_argument("words", nargs="*", metavar="KEY=VALUE")
    _command(
        commands, "report", report, "write a page with the curves of a run, or of several runs side by side", RUN_EPILOG
    ).add_argument("words", nargs="*", metavar="KEY=VALUE")
    _command(
        commands, "doctor", doctor, "check versions, devices, kernels, disk and network of this machine", None
    ).add_argument("words", nargs="*", metavar="KEY=VALUE")
    _command(
        commands, "init", init, "write a first configuration file (asks, or model=… data=… out=FILE)", None
    ).add_argument("words", nargs="*", metavar="KEY=VALUE")
    _command(commands, "schema", schema, "print the JSON Schema of a configuration file, for editors", None)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    epilog: str | None,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _plan(options: argparse.Namespace) -> tuple[Plan, Launcher]:
    """Make the plan of a run, and check this machine for commands that start it."""
    from ..checks.machine import check_machine
    from ..errors import MachineError
    from .machine.environ import find_site
    from .planning import plan_run

    made, launcher = plan_run(options.words, options.config_dir, find_site())
    if options.command in ("train", "submit") and (faults := check_machine(made.config)):
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
