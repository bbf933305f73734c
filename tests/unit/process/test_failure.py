"""The first report of a run is that of the cause, not of a rank that lost its connection to it."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest

from dist_ft.errors import TrainingError
from dist_ft.process import failure
from dist_ft.process.place import Place

RESET = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:21301"


def raised(message: str, cause: Exception | None = None) -> Exception:
    try:
        raise RuntimeError(message) from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(RESET), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (raised("cannot be written", ConnectionResetError("Connection reset by peer")), True),
        (TrainingError.of("step-3", "cannot be written: Broken pipe", "check the disk"), True),
        (ValueError("injected fault"), False),
        (raised("step 3", ValueError("loss is nan")), False),
    ],
)
def test_lost_connections(error: Exception, lost: bool) -> None:
    assert failure.has_lost_connection(error) == lost


def test_a_lost_connection_is_reported_after_its_cause(tmp_path: Path) -> None:
    terminal = io.StringIO()
    threading.Timer(0.2, lambda: failure.claim(tmp_path, Place(1, 2), 4, "rank 1 was killed")).start()
    code = failure.report(RuntimeError(RESET), place=Place(0, 2), run_dir=tmp_path, terminal=terminal)
    assert code == 4 and terminal.getvalue() == ""
    assert json.loads((tmp_path / "failure.json").read_text())["rank"] == 1


def test_a_lost_connection_without_a_cause_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "OTHERS_S", 0.1)
    terminal = io.StringIO()
    failure.report(RuntimeError(RESET), place=Place(0, 2), run_dir=tmp_path, terminal=terminal)
    assert "Connection closed by peer" in terminal.getvalue()
