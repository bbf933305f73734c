"""Measure step time, tokens/s, model FLOPs utilization and peak memory of training steps on one device.

    python benchmarks/gpu.py                 # one GPU: a random 1.1 B Llama, bfloat16
    python benchmarks/gpu.py --tiny          # any machine: a toy model

Weights and tokens are random, because matrix products with zeros are faster on GPUs. Each case runs in a separate
process, so that peak memory is measured for this case alone; the first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    },
}  # fmt: skip
CASES = [
    *((method, "auto", checkpointing) for method in ("full", "lora") for checkpointing in (False, True)),
    ("lora", "sdpa", False),  # document by document
]
WARM_UP = 3


def make_inputs(folder: Path, size: str, documents: int, longest: int) -> None:
    """Write a model with random weights, and documents of random tokens with lengths like those of instructions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES[size], dtype="bfloat16")).bfloat16().save_pretrained(folder / "model")
    dice = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(documents):
            ids = [dice.randrange(SIZES[size]["vocab_size"]) for _ in range(dice.randint(longest // 8, longest))]
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]}) + "\n")


def run_case(folder: Path, method: str, attention: str, checkpointing: bool, batch: int, steps: int) -> dict[str, Any]:
    """Train in this process and return the median of each metric over the counted steps."""
    from recorded import train

    from dist_ft.config.run import RunConfig

    config = RunConfig.model_validate(
        {
            "run_name": "gpu",
            "output_dir": str(folder / f"{method}-{attention}-{checkpointing}"),
            "model": {
                "name_or_path": str(folder / "model"),
                "dtype": "bfloat16",
                "attn_implementation": attention,
                "gradient_checkpointing": checkpointing,
            },
            "task": {"name": "instruction", "max_length": 4096},
            "data": {"train": str(folder / "rows.jsonl"), "format": "tokens", "cache_dir": str(folder / "cache")},
            "method": {"name": method},
            "engine": {"name": "ddp"},
            "optim": {"learning_rate": 1e-5},
            "train": {"max_steps": steps, "global_batch_size": batch, "per_device_train_batch_size": batch},
            "track": {"wandb": "off"},
            "launch": {"name": "local", "workers_per_node": 1},
        }
    )
    names = ("perf/step_time_s", "perf/tokens_per_second", "perf/mfu", "perf/peak_memory_bytes", "train/loss")
    counted = train(config)[WARM_UP:]
    return {name: statistics.median(step[name] for step in counted) for name in names if name in counted[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--case", help="method,attention,checkpointing: run one case in this process")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    batch = 4 if given.tiny else 16
    if given.case:
        method, attention, checkpointing = given.case.split(",")
        record = run_case(given.folder, method, attention, checkpointing == "True", batch, given.steps)
        print(json.dumps(record), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), "tiny" if given.tiny else "1b", 64, 64 if given.tiny else 1024)
        for case in CASES:
            words = ",".join(map(str, case))
            command = [sys.executable, __file__, "--case", words, "--folder", folder, "--steps", str(given.steps)]
            result = subprocess.run(
                [*command, *(["--tiny"] if given.tiny else [])], capture_output=True, text=True, check=False
            )
            outcome = result.stdout.strip().splitlines()[-1] if result.returncode == 0 else result.stderr[-2000:]
            print(f"{words:24} {outcome}", flush=True)


if __name__ == "__main__":
    main()
