"""`dist-ft COMMAND`: composes, checks, plans, and starts. Everything slow is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.plan import Plan
    from ..config.run import RunConfig
    from .environ import Site
    from .launcher import Launcher

CONFIG_EPILOG = """\
words:
  GROUP=CHOICE    a file of conf/GROUP: model, task, data, method, engine, optim, track, launch, experiment
  KEY=VALUE       a key by dots: method.r=8, train.max_steps=100, data.train=rows.jsonl
"""
RUN_EPILOG = """\
words:
  run=FOLDER      the folder of a run, such as run=runs/first
  KEY=VALUE       further settings of this command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; a user's fault is shown without a traceback, ours with one."""
    parser = _parser()
    options = parser.parse_args(arguments)
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
    except BrokenPipeError:  # of `dist-ft schema | head`
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def train(options: argparse.Namespace) -> int:
    """Train where it is typed; the run's exit code."""
    config, plan, launcher = _plan(options)
    from ..errors import RequestError

    if config.launch.name == "slurm":
        raise RequestError.of("launch=slurm", "is a scheduler's", "hand it over with `dist-ft submit launch=slurm …`")
    _write(plan)
    print(f"{plan.config.run_name}: {_workers(plan)} → {_short(plan.run_dir)}", flush=True)
    if code := _prepare(plan):
        return code
    result = launcher.submit(plan)
    assert isinstance(result, int), "a launcher in the foreground returns an exit code"
    return result


def sweep(options: argparse.Namespace) -> int:
    """Train many times with values that a search chooses."""
    from .sweep import read_words, sweep

    return sweep(read_words(options.words), *_many(options))


def stages(options: argparse.Namespace) -> int:
    """Train several times, each run starting from the model of the one before."""
    from pathlib import Path

    from .process import run_module
    from .stages import read_stages, run_stages

    def export(words: Sequence[str]) -> int:
        return run_module(["dist_ft.launch.cli", "export", *words])

    return run_stages(read_stages(Path(options.file), options.words), *_many(options), export)


def _many(options: argparse.Namespace) -> tuple[Callable[[Sequence[str]], RunConfig], Callable[[Sequence[str]], int]]:
    """How a command that trains several times checks the words of a run, and how it trains."""
    from .process import run_module

    def check(words: Sequence[str]) -> RunConfig:
        return _plan(argparse.Namespace(words=words, config_dir=options.config_dir, command="train"))[0]

    def train(words: Sequence[str]) -> int:
        return run_module(["dist_ft.launch.cli", "train", *own_dir, *words])

    own_dir = ["--config-dir", options.config_dir] if options.config_dir else []
    return check, train


def submit(options: argparse.Namespace) -> int:
    """Hand a run to a scheduler."""
    config, plan, launcher = _plan(options)
    from ..errors import RequestError

    if config.launch.name != "slurm":
        way_out = "train here with `dist-ft train`, or choose launch=slurm"
        raise RequestError.of(f"launch={config.launch.name}", "has no scheduler to submit to", way_out)
    _write(plan)
    if code := _prepare(plan):
        return code
    from .launcher import Job

    job = launcher.submit(plan)
    assert isinstance(job, Job), "a scheduler returns a job"
    print(f"job {job.identity}: {plan.config.run_name}, {_workers(plan)}")
    print(f"  follow   {job.follow}")
    print(f"  workers  {_short(plan.run_dir)}/logs/rank-<r>.log")
    print(f"  state    squeue --job {job.identity}        end it: scancel {job.identity}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Show what a run would be; writes nothing into the run's folder and starts no worker."""
    _, made, launcher = _plan(options)
    from .show import show_plan

    show_plan(made, launcher.render(made))
    return 0 if options.brief else _module("dist_ft.inspect.model", made, [])


def data(options: argparse.Namespace) -> int:
    """Show rows as the model sees them."""
    own = [word for word in options.words if word.partition("=")[0] in ("rows", "split", "width")]
    options.words = [word for word in options.words if word not in own]
    _, made, _ = _plan(options)
    return _module("dist_ft.inspect.rows", made, own)


def outcome(options: argparse.Namespace) -> int:
    """`eval`, `generate` and `export`: work on a finished or running run's folder."""
    from ..config.plan import read_plan
    from ..errors import RequestError
    from .process import run_module

    runs = [word.partition("=")[2] for word in options.words if word.startswith("run=")]
    if len(runs) != 1 or not runs[0]:
        raise RequestError.of("run", "must be given once", f"dist-ft {options.command} run=runs/NAME")
    read_plan(runs[0])  # a wrong name is said here, at once
    rest = [word for word in options.words if not word.startswith("run=")]
    wrong = [word for word in rest if "=" not in word]
    if wrong:
        raise RequestError.of(wrong[0], "is not KEY=VALUE", f"see `dist-ft {options.command} --help`")
    module = {
        "eval": "dist_ft.assess.evaluate",
        "generate": "dist_ft.assess.generate",
        "export": "dist_ft.export.merge",
    }[options.command]
    # The file that was named, not where the plan says it was written: a run's folder may have been moved.
    return run_module([module, _run_file(runs[0]), *rest])


def doctor(options: argparse.Namespace) -> int:
    """Look at this machine."""
    from .process import run_module

    return run_module(["dist_ft.diagnosis.doctor", *options.words])


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON Schema of a configuration."""
    from ..config.run import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ft",
        description="Fine-tunes language models on one machine or many. A run that exits 0 trained what you meant.",
        epilog="exit codes: 0 done, 2 the request is wrong, 3 the environment is wrong, 4 training failed, "
        "75 stopped with a checkpoint (run again to go on)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", train, "train here, or on the hosts of a hostfile"),
        ("submit", submit, "hand a run to SLURM"),
        ("sweep", sweep, "train many times and find the best values: KEY=choice(A,B) trials=20 metric=loss"),
        ("stages", stages, "train several times, each run starting from the model of the one before"),
        ("plan", plan, "show what a run would be, and start nothing"),
        ("data", data, "show rows as the model sees them, supervised tokens coloured (rows=3)"),
    ):
        command = _command(commands, name, run, text, CONFIG_EPILOG)
        command.add_argument("--config-dir", metavar="DIR", help="a folder with groups of your own (model/mine.yaml)")
        if name == "stages":
            command.add_argument("file", metavar="FILE", help="a YAML file of stages, see the README")
        command.add_argument("words", nargs="*", metavar="KEY=VALUE")
        if name == "plan":
            command.add_argument("--brief", action="store_true", help="without the tables of model and data")
    for name, text in (
        ("eval", "evaluate a run's model on its validation or test data"),
        ("generate", "answer a prompt, or chat, with a run's model (prompt='…')"),
        ("export", "write a run's model as a Hugging Face folder"),
    ):
        _command(commands, name, outcome, text, RUN_EPILOG).add_argument("words", nargs="*", metavar="KEY=VALUE")
    _command(
        commands, "doctor", doctor, "look at versions, devices, kernels, disk and network of this machine", None
    ).add_argument("words", nargs="*", metavar="KEY=VALUE")
    _command(commands, "schema", schema, "print the JSON Schema of a configuration, for editors", None)
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


def _plan(options: argparse.Namespace) -> tuple[RunConfig, Plan, Launcher]:
    """Compose, check, resolve and plan; every problem that can be known is raised at once."""
    from ..checks.machine import check_machine
    from ..checks.request import check
    from ..config.plan import make_plan
    from ..errors import MachineError, Problem, RequestError
    from .compose import compose
    from .environ import find_site

    composed = compose(options.words, options.config_dir)
    config = composed.config
    problems: list[Problem] = check(config, composed.origins)
    launcher = _launcher(config, find_site())
    made = None
    try:
        nodes, workers = launcher.resolve(config)
        made = make_plan(config, nodes=nodes, workers_per_node=workers, origins=composed.origins)
    except RequestError as error:
        problems += error.problems
    if problems or made is None:
        raise RequestError(*problems)
    if options.command in ("train", "submit") and (faults := check_machine(config)):
        raise MachineError(*faults)
    return config, made, launcher


def _launcher(config: RunConfig, site: Site) -> Launcher:
    if config.launch.name == "local":
        from .local import LocalLauncher

        return LocalLauncher(site)
    if config.launch.name == "deepspeed":
        from .deepspeed import HostfileLauncher

        return HostfileLauncher(site)
    from .slurm import SlurmLauncher

    return SlurmLauncher(site)


def _write(made: Plan) -> None:
    from ..config.plan import write_plan
    from ..errors import MachineError

    try:
        write_plan(made)
    except OSError as error:
        raise MachineError.of(
            str(made.run_dir), f"cannot be written: {error}", "make room, or set output_dir"
        ) from error


def _prepare(made: Plan) -> int:
    """Convert the model and tokenise the data before anything is started, unless it is done; an exit code."""
    from ..data.store.identity import is_prepared
    from .process import run_module

    if is_prepared(made.config):
        return 0
    return run_module(["dist_ft.prepare", str(made.run_file)])


def _module(module: str, made: Plan, words: list[str]) -> int:
    """Run a module on a plan that is in a temporary folder: nothing is written into the run's own."""
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
