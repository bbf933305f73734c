"""`make setup` shows progress, stops on an error, and says what comes next; pip, uv and venv are stand-ins."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = """\
Obtaining file:///work
  Preparing editable metadata (pyproject.toml): started
Collecting torch>=2.10 (from dist-ft==0.1.0)
  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (175.3 MB)
Collecting filelock (from torch>=2.10->dist-ft==0.1.0)
  Downloading filelock-3.20.0-py3-none-any.whl (16 kB)
Installing collected packages: filelock, torch
Successfully installed filelock-3.20.0 torch-2.13.0
"""


@pytest.fixture
def make(tmp_path):
    """Function that runs make in a copy whose Python is a stand-in, and returns exit code and output."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pip.txt").write_text(PIP)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        f'  "-m venv"*) mkdir -p .venv/bin && cp {python} .venv/bin/python ;;\n'
        '  "-m pip config list") cat pip.conf 2> /dev/null ;;\n'
        f'  "-m pip"*) {sys.executable} "$@" --help > /dev/null || exit 2  # pip itself judges the options\n'
        f'    echo "$*" >> commands; cat {tmp_path}/pip.txt; [[ -z $FAILS ]] || exit 1 ;;\n'
        "esac\n"
    )
    python.chmod(0o755)

    def run(*words, terminal=False, **env):
        command = ["make", "setup", f"PYTHON={python}", *words]
        full = {**os.environ, **env}
        if not terminal:
            done = subprocess.run(command, cwd=tmp_path, env=full, capture_output=True, text=True, timeout=60)
            return done.returncode, done.stdout
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, cwd=tmp_path, env=full, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # the other end is closed
            pass
        return process.wait(timeout=60), shown.decode()

    run.folder = tmp_path
    return run


def test_progress_is_shown_and_the_next_commands_are_named(make):
    code, shown = make("UV=")
    assert code == 0
    lines = shown.splitlines()
    assert lines[:3] == [
        "installing dist-ft into .venv …",
        "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (175.3 MB)",
        "  Installing 2 packages",
    ]
    assert "dist-ft is installed in .venv." in lines
    for command in ("make train", ". .venv/bin/activate", "dist-ft doctor"):
        assert any(line.startswith(f"  {command}  ") for line in lines)


def test_a_terminal_gets_one_line_that_is_erased(make):
    code, shown = make("UV=", terminal=True)
    assert code == 0
    after = shown.partition("into .venv …\r\n")[2]
    progress = after.split("\n")[0]
    assert "\r  Collecting filelock\x1b[K" in progress and "\r  Installing 2 packages\x1b[K" in progress
    assert progress.split("\x1b[K")[-2] == "\r", "the last line is erased"


def test_an_error_of_pip_ends_make(make):
    code, shown = make("UV=", FAILS="1")
    assert code == 2 and "is installed" not in shown
    assert not (make.folder / ".venv" / "runtime.stamp").exists()


def test_uv_installs_unless_pip_is_configured(make):
    programs = make.folder / "programs"
    programs.mkdir()
    (programs / "uv").write_text('#!/bin/bash\necho "uv $*" >> commands\n')
    (programs / "uv").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    commands = make.folder / "commands"
    assert make(PATH=path, PIP_FLAGS="--index-url https://index.example/simple")[0] == 0
    assert commands.read_text().splitlines()[0] == (
        "uv pip install --python .venv/bin/python --index-url https://index.example/simple -c constraints.txt -e ."
    )
    commands.unlink()
    shutil.rmtree(make.folder / ".venv")
    (make.folder / "pip.conf").write_text("global.index-url='https://mirror.example/simple'\n")
    assert make(PATH=path)[0] == 0
    assert commands.read_text().startswith("-m pip ")
