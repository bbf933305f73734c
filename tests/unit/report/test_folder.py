"""How a run stands is told by its folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.errors import RequestError
from dist_ft.report.folder import read_folder
from tests.reports import RECORD, finish, write_run

OWN = (
    "import sys, time; from pathlib import Path; from dist_ft.process.owner import own\n"
    "own(Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"
)


def test_a_run_that_some_process_owns_is_running(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert read_folder(run).status == "ended"
    owner = subprocess.Popen([sys.executable, "-c", OWN, str(run)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline()
        assert read_folder(run).status == "running"
    finally:
        owner.kill()
        owner.communicate()
    assert read_folder(run).status == "ended"


@pytest.mark.parametrize(("code", "status"), [(75, "stopped"), (4, "failed"), (130, "failed")])
def test_the_report_of_the_workers_decides(code: int, status: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    finish(run)
    (run / "failure.json").write_text(json.dumps({"exit_code": code, "report": "why"}))
    assert read_folder(run).status == status


def test_an_export_of_an_earlier_start_does_not_complete_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={**RECORD, "started": "2026-05-01T00:00:00+00:00"})
    finish(run)
    card = run / "model" / "README.md"
    assert card.stat().st_mtime > time.time() - 60
    assert read_folder(run).status == "finished"
    os.utime(card, (0, 1_700_000_000))
    assert read_folder(run).status == "ended"


def test_a_planned_run_and_files_that_are_torn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={})
    (run / "metrics.jsonl").unlink()
    assert read_folder(run).status == "planned"
    for name in ("record.json", "failure.json", "eval-test.json", "predictions-test.jsonl"):
        (run / name).write_text('{"half')
    found = read_folder(run)
    assert (found.status, found.step, dict(found.failure)) == ("planned", 0, {})
    assert found.predictions == {"predictions-test.jsonl": []}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the run does not exist"):
        read_folder(tmp_path)
