"""Entry point of the commands that inspect a run: error output and exit codes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from ..errors import DistFtError, RequestError


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
