"""What a worker imports: libraries that take seconds only where the run needs them."""

import json
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


PEFT = """
import sys, types
from pathlib import Path
from dist_ft.worker import leave_out_bitsandbytes
model = types.SimpleNamespace(quantization=sys.argv[1] or None)
leave_out_bitsandbytes(types.SimpleNamespace(config=types.SimpleNamespace(model=model)), Path(sys.argv[2]))
import peft
print("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.parametrize(
    ("quantization", "stored", "imports"),
    [("none", None, False), ("", None, False), ("nf4", None, True), ("none", {"quant_method": "bitsandbytes"}, True)],
)
def test_peft_does_not_import_the_compiler_for_a_model_that_is_not_quantized(tmp_path, quantization, stored, imports):
    config = {"model_type": "llama", **({"quantization_config": stored} if stored else {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", PEFT, quantization, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[-1] == str(imports)


def test_deepspeed_does_not_import_mlflow_and_a_tracker_still_can():
    code = "import sys, dist_ft.engine.deepspeed; print('mlflow' in sys.modules); import mlflow"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "False"
