"""Parsers of commands, whose help lists the command's own words with their defaults.

Words are described by pydantic, which is imported only to print the help of a command.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from ... import __version__
from ...errors import RequestError
from .completion import SHELLS, complete_word

# What runs a command, one sentence on what it does, the words that several commands take, the class of its own words.
Command = tuple[Callable[[argparse.Namespace], int], str, "str | None", "str | None"]

CONFIG_WORDS = """\
arguments:
  FILE.yaml       configuration file, see `dist-ft init`
  GROUP=CHOICE    choice of a group, see `dist-ft list`: model, task, data, method, engine, optim, track, launch,
                  experiment; model= and data= also take a folder or OWNER/NAME, and data= a file
  KEY=VALUE       dotted key: method.r=8, train.max_steps=100, data.train=rows.jsonl; `dist-ft help KEY` explains it
"""
RUN_WORDS = """\
arguments:
  run=FOLDER      the folder of a run, for example run=runs/first
"""
WIDTH = 118
ONE_FILE = "give the file itself: `dist-ft train FILE.yaml`"
SHOW_CONFIG = "use `dist-ft plan … show=config`"
SWEEP = "use `dist-ft sweep`, with `method.r=choice(4,8)` for several values"
# Options of a Hydra program → what to write here.
HYDRA_FLAGS = {
    "-m": SWEEP,
    "--multirun": SWEEP,
    "-c": SHOW_CONFIG,
    "--cfg": SHOW_CONFIG,
    "--resolve": f"{SHOW_CONFIG}, which shows resolved values",
    "-i": "use `dist-ft plan`, which shows the origin of every value",
    "--info": "use `dist-ft plan`, which shows the origin of every value",
    "-p": f"{SHOW_CONFIG}, and read the section",
    "--package": f"{SHOW_CONFIG}, and read the section",
    "-cd": "write --config-dir DIR",
    "-cn": ONE_FILE,
    "--config-name": ONE_FILE,
    "-cp": "write --config-dir DIR for a folder with groups, or " + ONE_FILE,
    "--config-path": "write --config-dir DIR for a folder with groups, or " + ONE_FILE,
    "-r": "leave it out: `dist-ft train` runs",
    "--run": "leave it out: `dist-ft train` runs",
    "--hydra-help": "use `dist-ft help KEY` and `dist-ft list`",
    "-sc": "use `dist-ft completion bash`",
    "--shell-completion": "use `dist-ft completion bash`",
}


class CommandParser(argparse.ArgumentParser):
    """Parser of one command.

    Attributes:
        options: Name of the class in `process/options.py` that describes the command's own words.
    """

    options: str | None = None

    def error(self, message: str) -> NoReturn:
        """Raise a RequestError, so that all errors look alike."""
        raise RequestError.of(self.prog, message, f"see `{self.prog} --help`")

    def format_help(self) -> str:
        """Return the help, with the command's own words."""
        if self.options is None:
            return super().format_help()
        return super().format_help() + ("" if self.epilog else "\narguments:\n") + options_text(self.options)


def refuse_flags(prog: str, unknown: Sequence[str]) -> None:
    """Refuse options that no command has; those of Hydra with what to write instead.

    Raises:
        RequestError: If there is an option among the arguments that argparse left over.
    """
    for word in unknown:
        if word.startswith("-"):
            way_out = HYDRA_FLAGS.get(word.partition("=")[0], f"see `{prog} --help`")
            raise RequestError.of(word, "is not an option of this command", way_out)


def build_parser(table: Mapping[str, Command]) -> CommandParser:
    """Build the parser of the command line.

    Args:
        table: Commands by name.
    """
    parser = CommandParser(
        prog="dist-ft",
        description="Fine-tune language models on one or several machines. A run that exits 0 trained what you meant.",
        epilog="exit codes: 0 success, 2 invalid request, 3 unsuitable environment, 4 training failed, "
        "75 stopped with a checkpoint (run the same command again to resume)",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dist-ft {__version__}", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, text, words, own) in table.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=words,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.options = own
        command.set_defaults(run=run, own_words=own, takes_config=words is CONFIG_WORDS)
        _add_arguments(command, name, has_words=bool(words or own))
    commands.choices["help"].set_defaults(parsers=commands.choices)
    return parser


def _add_arguments(command: CommandParser, name: str, *, has_words: bool) -> None:
    if command.get_default("takes_config") or name == "list":
        command.add_argument("--config-dir", metavar="DIR", help="folder with your own groups (DIR/model/mine.yaml)")
    if name == "stages":
        command.add_argument("file", metavar="FILE", help="YAML file that lists the stages, see docs/many-runs.md")
    elif name == "list":
        command.add_argument("group", nargs="?", metavar="GROUP", help="for example method or experiment")
    elif name == "help":
        command.add_argument("key", nargs="?", metavar="KEY", help="key, section or command: method.r, train, plan")
    elif name == "completion":
        command.add_argument("shell", choices=SHELLS)
    elif name == "plan":
        command.add_argument("--brief", action="store_true", help="omit the tables of the model and the data")
    if has_words or name == "doctor":
        words = command.add_argument("words", nargs="*", metavar="KEY=VALUE")
        words.completer = complete_word  # type: ignore[attr-defined]


def options_text(kind: str) -> str:
    """Return a line for each option of a class in `process/options.py`: its name, default and description."""
    from ...process import options

    lines = []
    for name, field in getattr(options, kind).model_fields.items():
        default = "" if field.is_required() or field.default is None else _shown(field.default)
        head = f"  {name}={default}"
        text = textwrap.wrap(field.description or "", WIDTH - 29) or [""]
        lines.append(f"{head:<28} {text[0]}" if len(head) <= 28 else f"{head}\n{' ' * 29}{text[0]}")
        lines += [f"{' ' * 29}{line}" for line in text[1:]]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
