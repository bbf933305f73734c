#!/usr/bin/env bash
# Runs all GPU measurements in one call of under ten minutes; prints versions first. Without a GPU, it ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
python3 - <<'PY'
import torch, transformers, peft
print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none: this machine has no GPU")
PY
if [[ " $* " != *" --tiny "* ]] && ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    exit 0 # --tiny measures a toy model on any machine
fi
failed=0
if python3 -c 'import pytest' 2>/dev/null; then
    timeout 290 python3 -m pytest -q -rs tests/gpu -m gpu -p no:cacheprovider || failed=1
fi
timeout 90 python3 benchmarks/attention.py || failed=1
timeout 210 python3 benchmarks/gpu.py "$@"
exit $failed
