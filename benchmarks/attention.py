"""Measure the attention kernels that this machine has on documents of one row: time of a layer, forward and backward.

    python benchmarks/attention.py                # on a GPU: 8,192 tokens, 32 heads of 128, 8 of keys and values
    python benchmarks/attention.py --tokens 512   # on any machine, where the plain formula is the only kernel

Lengths of documents are drawn uniformly; the FLOPs counted are those of the causal halves of the documents.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from dist_ft.model.attention import available, kernels
from dist_ft.model.attention.boundaries import Boundaries
from dist_ft.model.attention.choice import IN_ONE_CALL
from dist_ft.model.attention.documents import DOCUMENTS, KERNELS

HEADS, GROUPS, WIDTH = 32, 4, 128


def draw_lengths(tokens: int, longest: int) -> tuple[int, ...]:
    """Return lengths of documents that fill a row."""
    dice, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(min(dice.randint(longest // 16, longest), tokens - sum(lengths)))
    return tuple(lengths)


def measure(kernel: kernels.Kernel, boundaries: Boundaries, dtype: torch.dtype, repeats: int = 7) -> float:
    """Return the median seconds of a forward with its backward."""
    device, tokens = boundaries.device, sum(boundaries.lengths)
    sizes = (HEADS, HEADS // GROUPS, HEADS // GROUPS)
    q, k, v = (torch.randn(tokens, heads, WIDTH, device=device, dtype=dtype, requires_grad=True) for heads in sizes)
    along = torch.randn(tokens, HEADS, WIDTH, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.autograd.grad(kernel(q, k, v, boundaries, kernels.Form()), (q, k, v), along)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=2048)
    words = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    boundaries = Boundaries(draw_lengths(words.tokens, words.longest), device)
    flops = 3.5 * 2 * HEADS * WIDTH * sum(length**2 for length in boundaries.lengths)  # backward: 2.5 forwards
    print(f"{len(boundaries.lengths)} documents, {words.tokens} tokens, {device.type}, {dtype}")
    print("| kernel | ms | TFLOP/s |")
    print("| --- | --- | --- |")
    heads = available.Heads(GROUPS, ((WIDTH, WIDTH),), frozenset())
    for name in (*IN_ONE_CALL, "plain formula, document by document"):
        why = available.why_not(name, heads, device, dtype) if name in IN_ONE_CALL else None
        if why is not None:
            print(f"| {name} | {why} | |")
            continue
        seconds = measure(KERNELS[DOCUMENTS[name]] if name in IN_ONE_CALL else kernels.reference, boundaries, dtype)
        print(f"| {name} | {1000 * seconds:.2f} | {flops / seconds / 1e12:.2f} |", flush=True)


if __name__ == "__main__":
    main()
