"""Run `torchrun` without its own traceback: `python -m dist_ft.launch.torchrun ARGUMENTS`, with torchrun's arguments.

After a failure, torchrun exits with code 1 and prints 40 lines of traceback below the report of the worker. This
module returns the exit code of the worker that failed first and prints nothing. It passes signals on to the workers.
"""

from __future__ import annotations

import logging
import runpy
import sys

from .forward import forward_signals


def main() -> int:
    """Run torchrun in this process and return the exit code of the first failed worker, 128 + N for signal N."""
    forward_signals()
    logging.disable(logging.ERROR)  # in this process only: its messages repeat those of the failed worker
    try:
        # Run by name, because no module of dist_ft.launch imports torch.
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except Exception as error:
        kind = type(error).__name__
        if kind == "ChildFailedError":
            _, failure = error.get_first_failure()  # type: ignore[attr-defined]
            code = int(failure.exitcode)
            return code if code >= 0 else 128 - code
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
