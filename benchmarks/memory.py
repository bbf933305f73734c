"""Measure the memory of each rank by method and engine: peak resident memory, weights, gradients and optimizer state.

    python benchmarks/memory.py --methods lora qlora full --engines ddp fsdp zero1 zero2 zero3

Two workers on this machine train a random 107 M Llama in bfloat16 for two steps of 8 short rows, so that weights and
not activations dominate. Peaks are relative to the process before the model is built. Each case runs in separate
processes. Bytes are counted as in tests/dist/test_memory.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests/dist/held.py, which counts bytes

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 16},
    "qlora": {"name": "qlora", "r": 16},
    "full": {"name": "full"},
}
WORLD, MIB = 2, 2**20


def make_inputs(folder: Path) -> int:
    """Write a bfloat16 model and rows of random tokens; return the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=2048, max_position_embeddings=64, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "model")
    dice = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(16):
            ids = [dice.randrange(2048) for _ in range(12)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return sum(p.numel() for p in model.parameters())


def config_of(folder: Path, method: str, engine: str) -> dict[str, Any]:
    return {
        "run_name": "memory",
        "output_dir": str(folder / f"{method}-{engine}"),
        "model": {"name_or_path": str(folder / "model"), "dtype": "bfloat16"},
        "task": {"name": "instruction", "max_length": 48},
        "data": {"train": str(folder / "rows.jsonl"), "format": "tokens", "cache_dir": str(folder / "cache")},
        "method": METHODS[method],
        "engine": {"name": engine},
        "optim": {"learning_rate": 1e-4},
        "train": {"max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 4},
        "track": {"wandb": "off"},
        "launch": {"name": "local", "workers_per_node": WORLD},
    }


def main() -> None:
    from dist_ft.testing.spawn import spawn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp", "zero1", "zero2", "zero3"])
    words = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory returns to the system at once
    with tempfile.TemporaryDirectory() as top:
        parameters = make_inputs(Path(top))
        print(f"{parameters:,} parameters, {2 * parameters / MIB:.0f} MiB in 16 bits; MiB of rank 0 / rank 1\n")
        print("| method | engine | peak while built | peak while trained | frozen | trained | gradients | moments |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for method in words.methods:
            for engine in words.engines:
                case = {"config": config_of(Path(top), method, engine), "train": True}
                ranks = [found[0] for found in spawn(WORLD, "tests.dist.held:hold_all", [case], timeout_s=600)]
                names = ("build_peak", "train_peak", "frozen", "trained", "gradients", "optimizer")
                cells = [" / ".join(f"{rank[name] / MIB:.0f}" for rank in ranks) for name in names]
                print(f"| `{method}` | {engine} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
