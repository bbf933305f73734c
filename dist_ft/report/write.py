"""Writing a report: `python -m dist_ft.report.write RUN_DIR` writes that of a run, beside the training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.plan import REPORT_FILE
from ..errors import DistFtError, MachineError, RequestError
from .folder import read_folder

TIME_LIMIT_S = 600  # of the command beside the training


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, or of several runs side by side, and return its path.

    Args:
        runs: Folders of the runs.
        out: File to write; by default `report.html` in the folder of a single run, otherwise in the current folder.

    Raises:
        RequestError: A folder has no run, or `out` is a folder.
        MachineError: The file cannot be written.
    """
    folders = [read_folder(run) for run in runs]
    from .page import page_of, render  # after the folders are known to be runs: Plotly takes a while to import

    if out is None:
        out = (folders[0].path if len(folders) == 1 else Path()) / REPORT_FILE
    if out.is_dir():
        raise RequestError.of(f"out={out}", "is a folder", f"name a file, such as out={out / REPORT_FILE}")
    staging = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        staging.write_text(render(page_of(folders)), encoding="utf-8")
        os.replace(staging, out)
    except OSError as error:
        staging.unlink(missing_ok=True)
        way_out = "free disk space, or set out to a file that can be written"
        raise MachineError.of(str(out), f"cannot be written: {error}", way_out) from error
    return out


def main(arguments: Sequence[str]) -> int:
    """Write the report of the run in the folder `arguments[0]`, with the lowest priority and a time limit."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they stop the training, whose last report this may be
    signal.alarm(TIME_LIMIT_S)
    os.nice(19)
    try:
        write_report([Path(arguments[0])])
    except DistFtError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
