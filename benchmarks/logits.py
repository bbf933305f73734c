"""Measure peak memory of one training step against the size of the vocabulary, with and without losses in chunks.

    python benchmarks/logits.py --tokens 4096 --vocabularies 8192 32768 131072 262144 --all-up-to 131072

The model is a random Llama of one narrow block in float32 on the CPU, whose head is frozen as under LoRA, so that
logits dominate. Peaks are relative to the process before the step, which runs alone in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MIB = 2**20


def measure(vocabulary: int, tokens: int, chunked: bool) -> dict[str, float]:
    """Run one step in this process; return its peak memory, the time and the loss."""
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dist_ft.model.attention.documents import DOCUMENTS
    from dist_ft.model.head import attach_head
    from dist_ft.state import Batch
    from dist_ft.task.batches.tokens import sum_losses

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=vocabulary,
        attn_implementation=DOCUMENTS["sdpa"],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    lengths = (256,) * (tokens // 256)
    ids, positions = torch.randint(0, vocabulary, (1, tokens)), torch.arange(tokens)
    inputs = {"input_ids": ids, "position_ids": positions[None] % 256, "document_lengths": lengths}
    batch = Batch(inputs, ids[0].roll(-1), positions, positions // 256, tokens, tuple(range(len(lengths))))
    head = attach_head(model)[0] if chunked else None
    before, started = psutil.Process().memory_info().rss, time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    result = sum_losses(model, batch, head)
    result.loss.backward()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return {
        "peak_mib": (peak - before) / MIB,
        "cpu_s": time.process_time() - started,
        "loss": float(result.loss.detach()) / tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--all-up-to", type=int, default=131072, help="largest vocabulary whose logits fit in memory")
    parser.add_argument("--case", help="vocabulary,chunked: measure in this process")
    words = parser.parse_args()
    if words.case:
        vocabulary, chunked = words.case.split(",")
        print(json.dumps(measure(int(vocabulary), words.tokens, chunked == "chunks")))
        return
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory returns to the system at once
    print("| vocabulary | chunks, MiB | CPU-s | loss | all logits, MiB | CPU-s | loss | ratio of peaks |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for vocabulary in words.vocabularies:
        found = {}
        for kind in ("all", "chunks") if vocabulary <= words.all_up_to else ("chunks",):
            command = [sys.executable, __file__, "--tokens", str(words.tokens), "--case", f"{vocabulary},{kind}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        chunks, plain = found["chunks"], found.get("all")
        cells = [f"{vocabulary:,}", f"{chunks['peak_mib']:.0f}", f"{chunks['cpu_s']:.1f}", f"{chunks['loss']:.6f}"]
        if plain is not None:
            ratio = plain["peak_mib"] / chunks["peak_mib"]
            cells += [f"{plain['peak_mib']:.0f}", f"{plain['cpu_s']:.1f}", f"{plain['loss']:.6f}", f"{ratio:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
