#!/usr/bin/env bash
# Runs all GPU measurements in one call of under ten minutes; prints versions first.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
python3 - <<'PY'
import torch, transformers, peft
print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none: this machine has no GPU")
PY
if python3 -c 'import pytest' 2>/dev/null; then timeout 240 python3 -m pytest -q tests/gpu -m gpu || true; fi
timeout 330 python3 benchmarks/gpu.py "$@"
