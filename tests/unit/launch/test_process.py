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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all(tmp_path, signum, code):
    def send():
        wait_for((tmp_path / "pid").exists)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    assert run(rendered(STUBBORN + "time.sleep(60)", tmp_path), tmp_path, grace_s=0.5) == code
    thread.join()
    assert not alive(int((tmp_path / "pid").read_text()))
    assert signal.getsignal(signum) not in (None, signal.SIG_IGN)


def test_a_stop_with_a_checkpoint_is_75(tmp_path):
    code = "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    code += "pathlib.Path(sys.argv[1], 'pid').touch(); time.sleep(60)"
    thread = threading.Thread(target=lambda: (wait_for((tmp_path / "pid").exists), os.kill(os.getpid(), signal.SIGINT)))
    thread.start()
    assert run(rendered(code, tmp_path), tmp_path) == 75
    thread.join()


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
