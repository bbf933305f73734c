"""What a worker imports: libraries that take seconds only where the run needs them."""

import subprocess
import sys

import pytest

SLOW = ("peft", "bitsandbytes", "wandb", "deepspeed", "plotly", "datasets", "opacus")


@pytest.fixture(scope="module")
def imported():
    code = "import sys, dist_ft.prepare, dist_ft.build, dist_ft.loop, dist_ft.process.watchdog; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("name", SLOW)
def test_a_worker_imports_what_its_run_needs(imported, name):
    assert name not in imported
