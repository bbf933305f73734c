"""Signals reach a worker while its main thread is blocked, and are recorded or end it, as the phase says."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from dist_ft.process.stop import AGAIN, REPEAT_S, SIGNALS, WITH_AUTO, Stop, stop_signal

# The main thread never returns to Python, like one that waits in a collective.
WORKER = """
import ctypes, os
from dist_ft.process.stop import Stop
stop = Stop()
stop.listen()
{prepare}
print("ready", flush=True)
ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""


def start(prepare: str = "pass", **options: object) -> subprocess.Popen[str]:
    code = WORKER.format(prepare=prepare)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 75
    assert f"{number.name}: no step was trained since this start" in said and AGAIN in said


def test_a_second_signal_ends_a_training_process_and_a_repeated_one_does_not() -> None:
    process = start("stop.hold('auto')")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(REPEAT_S / 10)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(REPEAT_S)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT, a second signal" in said and "is lost" not in said and "are lost" in said


def test_an_ignored_signal_stays_ignored() -> None:
    process = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(REPEAT_S)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(5) == 75


def test_a_signal_that_was_blocked_by_the_launcher_is_received() -> None:
    process = start(preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 75


def test_a_request_that_is_not_a_signal_counts_as_none() -> None:
    stop = Stop()
    stop.hold("runs/a/checkpoints/step-3")
    stop.ask("time limit")
    stop.ask("SIGTERM", signal.SIGTERM)  # the scheduler's own signal, while the checkpoint is saved
    assert stop.cause == "time limit"
    assert str(stop.stopped("saved")).endswith(WITH_AUTO)


def test_after_all_is_saved_a_signal_says_what(capfd: pytest.CaptureFixture[str]) -> None:
    process = start("stop.hold('auto'); stop.ask('time limit'); stop.rest('step 9 is saved')")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 75 and "time limit: step 9 is saved" in said


def test_names_of_signals_in_exit_codes() -> None:
    assert [stop_signal(code) for code in (0, 2, 130, 137, 143)] == [None, None, "SIGINT", None, "SIGTERM"]
