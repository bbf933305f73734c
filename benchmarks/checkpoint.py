"""How long a step waits for a checkpoint: saved in the background, and with `train.async_save=false`.

    python benchmarks/checkpoint.py --gib 1 --repeats 5 --folder /a/disk

The state is that of a full fine-tuning: float32 weights and both moments, in tensors of a few MiB. One process saves it
again and again; between two saves, as between two steps, every tensor changes. The first save of each kind is listed
apart; the memory of its copy is reserved before, as in a run. What the background thread takes from a computation
beside it is measured by matrix products: how much slower they are while a checkpoint is written.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from dist_ft.checkpoint.saver import Saver
from dist_ft.process import comm
from dist_ft.process.place import Place
from dist_ft.state import NamedState, Progress

ROWS, COLUMNS = 1024, 4096  # 16 MiB in float32


def make_state(gib: float) -> NamedState:
    count = max(1, round(gib * 2**30 / (3 * 4 * ROWS * COLUMNS)))
    kinds = ("model", "exp_avg", "exp_avg_sq")
    tensors = {f"{kind}/layers.{i}.weight": torch.randn(ROWS, COLUMNS) for i in range(count) for kind in kinds}
    return NamedState(tensors, updates=1)


def products(seconds: float) -> float:
    """Return matrix products per second."""
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    count, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        left @ right
        count += 1
    return count / passed


def measure(state: NamedState, folder: Path, *, asynchronous: bool, repeats: int) -> list[tuple[float, float, float]]:
    """Return for each save how long it is waited for, the processor time of that, and how long until it is published.

    The processor time is that of the main thread, or of all threads if they are waited for.
    """
    clock = time.thread_time if asynchronous else time.process_time
    saver, found = Saver(folder, asynchronous=asynchronous), []
    saver.reserve(state)
    saver._copies._wait()  # a run has minutes for it
    for step in range(1, repeats + 2):
        for tensor in state.tensors.values():
            tensor.add_(1.0)
        begun, used = time.perf_counter(), clock()
        path = saver.save(state, Progress(step, 1, "ddp", None, None, None, 0))
        waited, used = time.perf_counter() - begun, clock() - used
        saver._wait()
        found.append((waited, used, time.perf_counter() - begun))
        shutil.rmtree(path)
    return found


def slowdown(state: NamedState, folder: Path) -> float:
    """Return the share of matrix products that is lost while a checkpoint is written."""
    alone = products(2.0)
    saver = Saver(folder, asynchronous=True)
    path = saver.save(state, Progress(1000, 1, "ddp", None, None, None, 0))
    count, begun = 0.0, time.perf_counter()
    while saver._thread is not None and saver._thread.is_alive():
        count += 0.1 * products(0.1)
    beside = count / (time.perf_counter() - begun)
    saver.settle()
    shutil.rmtree(path)
    return 1 - beside / alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-checkpoint"))
    options = parser.parse_args()
    comm.join(Place(), comm.open_store(Place(), 60), torch.device("cpu"), 60)
    torch.set_num_threads(1)
    state = make_state(options.gib)
    size = sum(t.numel() * t.element_size() for t in state.tensors.values())
    print(f"state of {size / 2**30:.2f} GiB in {len(state.tensors)} tensors, torch {torch.__version__}")
    print(
        "| save | waited for, first | waited for, median of the rest | processor time of it | until published, median |"
    )
    print("| --- | --- | --- | --- | --- |")
    waits, uses = {}, {}
    for asynchronous in (False, True):
        found = measure(state, options.folder, asynchronous=asynchronous, repeats=options.repeats)
        waits[asynchronous] = statistics.median(waited for waited, _, _ in found[1:])
        uses[asynchronous] = statistics.median(used for _, used, _ in found[1:])
        published = statistics.median(whole for *_, whole in found[1:])
        name = "in the background" if asynchronous else "waited for"
        times = (found[0][0], waits[asynchronous], uses[asynchronous], published)
        print(f"| {name} | " + " | ".join(f"{seconds:.3f} s" for seconds in times) + " |")
    print(f"a step waits {waits[True] / waits[False]:.1%} of a save that is waited for", end=", ")
    print(f"by processor time {uses[True] / uses[False]:.1%}")
    print(f"matrix products beside it lose {slowdown(state, options.folder):.0%}")
    comm.leave()


if __name__ == "__main__":
    main()
