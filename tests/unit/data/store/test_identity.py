"""Tests of the identity of prepared splits, which is computed without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys


def test_asking_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, json, dist_ft.data.store.identity; "
        "print(json.dumps([m in sys.modules for m in ('torch', 'transformers')]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [False, False]
