"""`KEY=VALUE` words of the commands that look at a run, and how such a command ends."""

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
    """The options of a command.

    Raises:
        RequestError: words that are no KEY=VALUE, unknown keys (with the nearest known one), wrong values; all at once.
    """
    values: dict[str, object] = {}
    problems = []
    fields = kind.model_fields
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            way_out = f"did you mean {near[0]}=…?" if near else f"known keys: {', '.join(fields)}"
            problems.append(Problem(word, "is not a setting of this command", way_out))
        elif key in values:
            problems.append(Problem(word, f"{key} is given twice", "give it once"))
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
    """Call `main` with this process's words; the exit code. A user's fault is shown without a traceback."""
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
    """Keep libraries' advice to their callers, and their progress bars, out of what a command prints."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # DeepSpeed, which accelerate imports, sets its logger's level itself; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def split_run(arguments: Sequence[str], command: str) -> tuple[str, Sequence[str]]:
    """The run's file, which comes first, and the words behind it.

    Raises:
        RequestError: there is no such word.
    """
    if not arguments or "=" in arguments[0]:
        raise RequestError.of("RUN_YAML", "is missing", f"python -m dist_ft.{command} runs/NAME/run.yaml [KEY=VALUE …]")
    return arguments[0], arguments[1:]


def _scalar(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _help(kind: type[Strict]) -> str:
    return "; ".join(f"{name}: {field.description}" for name, field in kind.model_fields.items() if field.description)
