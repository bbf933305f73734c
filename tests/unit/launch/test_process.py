import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_ft.launch.launcher import Rendered
from dist_ft.launch.process import exit_code, marked_descendants, run
from dist_ft.process.stop import REPEAT_S, SIGNALS

ROOT = Path(__file__).resolve().parents[3]
FAIL = "import json, pathlib, sys; pathlib.Path(sys.argv[1], 'failure.json').write_text(json.dumps({'exit_code': 3}))"
# Starts a grandchild that ignores SIGTERM in a session of its own, as torchrun does.
STUBBORN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"],
    start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[1] + "/pid", "w").write(str(child.pid))
"""


def rendered(code, *words):
    return Rendered({}, (sys.executable, "-c", code, *map(str, words)))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, limit_s=10.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "never"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75])
def test_documented_codes_pass(tmp_path, code):
    assert run(rendered(f"raise SystemExit({code})"), tmp_path) == code


def test_the_failed_workers_own_code_decides(tmp_path):
    assert run(rendered(FAIL + "; sys.exit(1)", tmp_path), tmp_path) == 3


def test_a_worker_that_failed_and_left_with_code_0_has_failed(tmp_path):
    assert run(rendered(FAIL + "; sys.exit(0)", tmp_path), tmp_path) == 3


def test_an_old_failure_is_forgotten(tmp_path, capfd):
    (tmp_path / "failure.json").write_text('{"exit_code": 3}')
    assert run(rendered("raise SystemExit(1)"), tmp_path) == 4
    assert "no worker wrote a report" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("status", "words"),
    [(-9, "killed (SIGKILL)"), (137, "SIGKILL"), (247, "SIGKILL"), (-11, "signal 11"), (139, "signal 11")],
)
def test_a_death_without_a_report_is_told(tmp_path, capsys, status, words):
    assert exit_code(status, tmp_path / "failure.json", tmp_path) == 4
    said = capsys.readouterr().err
    assert words in said
    assert str(tmp_path / "logs") in said


def test_nothing_is_left_behind_when_the_launcher_ends(tmp_path):
    assert run(rendered(STUBBORN, tmp_path), tmp_path) == 0
    assert not alive(int((tmp_path / "pid").read_text()))


def test_all_end_soon_after_a_failure(tmp_path):
    code = STUBBORN + FAIL + "\ntime.sleep(60)"
    began = time.monotonic()
    assert run(rendered(code, tmp_path), tmp_path, grace_s=0.5) == 3
    assert time.monotonic() - began < 5
    assert not alive(int((tmp_path / "pid").read_text()))


def send(folder, *signals, pause_s=0.0):
    """Send signals to this process once the launcher has started."""

    def wait_and_send():
        wait_for((folder / "pid").exists)
        for signum in signals:
            os.kill(os.getpid(), signum)
            time.sleep(pause_s)

    thread = threading.Thread(target=wait_and_send)
    thread.start()
    return thread


# Takes the signals like the workers of a run do, with what `on_signal` does then.
LISTENS = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def on_signal(signum, _):
    (folder / "heard").write_text(str(signum))
    {on_signal}
for signum in (1, 2, 10, 12, 15):
    signal.signal(signum, on_signal)
(folder / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_passed_on_and_a_stop_with_a_checkpoint_is_75(tmp_path, signum):
    thread = send(tmp_path, signum)
    assert run(rendered(LISTENS.format(on_signal="sys.exit(75)"), tmp_path), tmp_path, grace_s=0.5) == 75
    thread.join()
    assert (tmp_path / "heard").read_text() == str(int(signum))
    assert signal.getsignal(signum) not in (None, signal.SIG_IGN)


def test_a_checkpoint_may_take_longer_than_the_grace_period(tmp_path):
    thread = send(tmp_path, signal.SIGTERM)
    record = "time.sleep(1.5); (folder / 'failure.json').write_text(json.dumps({{'exit_code': 75}})); os._exit(1)"
    assert run(rendered(LISTENS.format(on_signal=record.format()), tmp_path), tmp_path, grace_s=0.3) == 75
    thread.join()


def test_a_run_that_ends_without_saving_tells_what_is_lost(tmp_path, capfd):
    (tmp_path / "checkpoints" / "step-40").mkdir(parents=True)
    thread = send(tmp_path, signal.SIGINT)
    assert run(rendered(LISTENS.format(on_signal="sys.exit(1)"), tmp_path), tmp_path) == 130
    thread.join()
    assert "what was trained since step 40, the last checkpoint, is lost" in capfd.readouterr().err


def test_a_launcher_that_had_not_started_workers_loses_nothing(tmp_path, capfd):
    thread = send(tmp_path, signal.SIGTERM)
    assert run(rendered(STUBBORN + "time.sleep(60)", tmp_path), tmp_path) == 75
    thread.join()
    assert "SIGTERM: no worker was started yet" in capfd.readouterr().err
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_second_signal_ends_all_at_once_and_a_repeated_one_does_not(tmp_path, capfd):
    began = time.monotonic()
    thread = send(tmp_path, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, pause_s=REPEAT_S * 0.8)
    assert run(rendered(LISTENS.format(on_signal="pass"), tmp_path), tmp_path) == 130
    thread.join()
    assert time.monotonic() - began < 10
    assert not alive(int((tmp_path / "pid").read_text()))
    assert "a second signal ended the run at once" in capfd.readouterr().err


def test_a_launcher_that_does_not_end_after_a_failure_is_killed_and_the_code_is_the_workers(tmp_path):
    record = "(folder / 'failure.json').write_text(json.dumps({'exit_code': 3}))"
    code = LISTENS.format(on_signal="pass").replace("while True:", f"{record}\nwhile True:")
    assert run(rendered(code, tmp_path), tmp_path, grace_s=0.4) == 3


def test_workers_on_other_hosts_are_asked_by_a_file(tmp_path):
    code = LISTENS.format(on_signal="pass").replace(
        "time.sleep(0.05)", "(folder / 'stop_requested').exists() and sys.exit(75)"
    )
    thread = send(tmp_path, signal.SIGHUP)
    assert run(rendered(code, tmp_path), tmp_path, by_file=True) == 75
    thread.join()
    assert (tmp_path / "stop_requested").read_text() == "SIGHUP"
    assert not (tmp_path / "heard").exists()


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        thread = send(tmp_path, signal.SIGHUP)
        code = "import pathlib, signal, sys, time; pathlib.Path(sys.argv[1], 'pid').touch(); time.sleep(0.5);"
        code += "sys.exit(signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)"
        assert run(rendered(code, tmp_path), tmp_path) == 0
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_before_anything_was_started_is_75(signum):
    code = "import os, sys, time\nfrom dist_ft.launch.process import nothing_started\n"
    code += "with nothing_started():\n    os.kill(os.getpid(), int(sys.argv[1])); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code, str(int(signum))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75
    assert f"{signum.name}: no worker was started yet, so nothing is lost" in done.stderr


@pytest.mark.faults
def test_the_launcher_ends_when_this_process_is_killed(tmp_path):
    inner = (
        "import pathlib, os, sys, time; pathlib.Path(sys.argv[1], 'inner').write_text(str(os.getpid())); time.sleep(60)"
    )
    outer = (
        "import sys, pathlib; from dist_ft.launch.launcher import Rendered; from dist_ft.launch.process import run\n"
    )
    outer += "run(Rendered({}, (sys.executable, '-c', sys.argv[2], sys.argv[1])), pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", outer, str(tmp_path), inner], cwd=ROOT)
    wait_for(lambda: (tmp_path / "inner").exists() and (tmp_path / "inner").read_text())
    process.kill()
    process.wait()
    pid = int((tmp_path / "inner").read_text())
    wait_for(lambda: not alive(pid), 5)


def test_only_marked_descendants_are_found():
    marked = subprocess.Popen(["sleep", "60"], env={**os.environ, "DIST_FT_LAUNCH": "abc"})
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, "DIST_FT_LAUNCH": "abcd"})
    try:
        wait_for(lambda: marked_descendants("abc") == [marked.pid])
        assert marked_descendants("nothing") == []
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun_hands_back_the_first_failed_workers_code_without_a_traceback(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)\n")
    words = ["--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command = [sys.executable, "-m", "dist_ft.launch.torchrun", *words, "--local-addr=127.0.0.1", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr == ""
