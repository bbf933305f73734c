"""Entry point of the commands that inspect a run: `KEY=VALUE` words, error output and exit codes."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import yaml
from pydantic import ValidationError

from ..config.strict import Strict
from ..errors import DistFtError, Problem, RequestError

Options = TypeVar("Options", bound=Strict)


def read_words(kind: type[Options], words: Sequence[str]) -> Options:
    """Parse the options of a command.

    Raises:
        RequestError: With all malformed words, unknown keys (and the closest known one) and invalid values at once.
    """
    values: dict[str, object] = {}
    problems = []
    fields = kind.model_fields
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            way_out = f"did you mean {near[0]}=…?" if near else f"known keys: {', '.join(fields)}"
            problems.append(Problem(word, "is not an option of this command", way_out))
        elif key in values:
            problems.append(Problem(word, f"{key} is set more than once", "set it once"))
        else:
            values[key] = text if fields[key].annotation in (str, str | None) else _scalar(text)
    if problems:
        raise RequestError(*problems)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()
        raise RequestError(
            *(Problem(".".join(map(str, e["loc"][:1])), f"{e['msg']} (got {e['input']!r})", _help(kind)) for e in wrong)
        ) from None


def run_command(main: Callable[[list[str]], None]) -> int:
    """Call `main` with the words of the command line and return the exit code; show `DistFtError` without traceback."""
    hush_libraries()
    try:
        main(sys.argv[1:])
    except DistFtError as error:
        sys.stdout.flush()
        print(f"dist-ft: {error.title}\n{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dist-ft: interrupted", file=sys.stderr)
        return 130
    return 0


def hush_libraries() -> None:
    """Suppress warnings and progress bars of libraries in the output of a command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # DeepSpeed, imported by accelerate, resets the level of its logger; a filter persists.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def split_run(arguments: Sequence[str], command: str) -> tuple[str, Sequence[str]]:
    """Split the arguments into the path of the run's file and the words after it.

    Raises:
        RequestError: If the path is missing.
    """
    if not arguments or "=" in arguments[0]:
        raise RequestError.of(
            "RUN_YAML", "is missing", f"start {command} with the arguments runs/NAME/run.yaml [KEY=VALUE …]"
        )
    return arguments[0], arguments[1:]


def _scalar(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _help(kind: type[Strict]) -> str:
    return "; ".join(f"{name}: {field.description}" for name, field in kind.model_fields.items() if field.description)
