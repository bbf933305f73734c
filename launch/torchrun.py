"""`torchrun` with a quiet end: `python -m dist_ft.launch.torchrun ARGUMENTS`, with torchrun's own arguments.

torchrun ends every failure with exit code 1 and 40 lines of traceback under the worker's own report. This hands back
the code of the worker that failed first and leaves the report alone.
"""

from __future__ import annotations

import logging
import runpy
import sys


def main() -> int:
    """Run torchrun in this process; returns the first failed worker's exit code, 128 + N for signal N."""
    logging.disable(logging.ERROR)  # of this process only: what it says repeats what a worker said or raises
    try:
        # By name, as everything of torch: this package imports none.
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except Exception as error:
        kind = type(error).__name__
        if kind == "ChildFailedError":
            _, failure = error.get_first_failure()  # type: ignore[attr-defined]
            code = int(failure.exitcode)
            return code if code >= 0 else 128 - code
        if kind == "SignalException":  # this process was told to end, and has ended its workers
            return 128 + int(error.sigval)  # type: ignore[attr-defined]
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
