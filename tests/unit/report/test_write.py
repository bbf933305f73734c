"""Writing a report: beside the training and by the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch import cli
from dist_ft.report.write import write_report
from tests.reports import status_in_report, write_run


def test_the_command_writes_one_run_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name)
    assert cli.main(["report", "run=runs/a"]) == 0
    assert status_in_report(tmp_path / "runs" / "a") == "ended"
    assert cli.main(["report", "run=runs/a", "run=runs/b/run.yaml"]) == 0
    assert "a · b" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli.main(["report", "run=runs/a", "run=runs/b", "out=other.html"]) == 0
    assert (tmp_path / "other.html").exists()
    assert capsys.readouterr().out.split() == ["runs/a/report.html", "report.html", "other.html"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "run: is missing"),
        (["run=runs/none"], "the run does not exist"),
        (["run=runs/a", "outt=x"], "did you mean out="),
        (["run=runs/a", "out=runs"], "is a folder"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    assert cli.main(["report", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


def test_a_report_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    old = write_report([run]).read_text(encoding="utf-8")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(Exception, match="disk full"):
        write_report([run])
    assert (run / "report.html").read_text(encoding="utf-8") == old
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "record.json", "report.html", "run.yaml"]


def test_beside_the_training_it_imports_no_torch_and_outlives_a_stop(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    code = (
        "import os, signal, sys; from dist_ft.report import write\n"
        "inner = write.write_report\n"
        "def stopped(*a): os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT); return inner(*a)\n"
        "write.write_report = stopped\n"
        "code = write.main([sys.argv[1]])\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules\n"
        "assert os.nice(0) == 19\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert status_in_report(run) == "ended"


def test_a_run_that_is_no_run_ends_with_the_exit_code_of_the_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "dist_ft.report.write", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == RequestError.exit_code and "the run does not exist" in done.stderr
