"""Compare the start of a run, up to its first step, with that of a loop in bare torch, transformers and peft.

    python benchmarks/start.py --repeats 5

A start is `dist-ft train` with one worker and prepared data, as it is typed: the command, its worker, and all that
they import. It is observed from outside: it ends when metrics.jsonl has a step. The other side loads the same model,
takes one step on a batch of the same size, and prints. Both alternate, and the model is so small that computing does
not count.
Reported are the least processor seconds (of all processes of a start) and the least seconds, and their ratios: on a
shared machine, only the former can be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BARE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
if sys.argv[2] == "lora":
    import peft
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
ids = torch.randint(3, 20, (8, 12))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
open(sys.argv[3], "w").write('{"step": 1}')
input()
"""
POLL_S = 0.01


def measure(command: list[str], folder: Path, file: Path) -> tuple[float, float]:
    """Return processor seconds of a command and all its processes, and seconds, until a file has a step."""
    file.unlink(missing_ok=True)
    began = time.monotonic()
    with (folder / "out.log").open("w") as out:
        child = psutil.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=out, stderr=out)
    while not (file.exists() and '"step": 1' in file.read_text()):
        if child.poll() is not None:
            raise SystemExit((folder / "out.log").read_text())
        time.sleep(POLL_S)
    seconds, used = time.monotonic() - began, 0.0
    for process in (child, *child.children(recursive=True)):
        times = process.cpu_times()
        used += times.user + times.system + times.children_user + times.children_system
    child.stdin.close()
    child.wait()
    return used, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from dist_ft.testing.words import save_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model("llama", folder / "model", "AutoModelForCausalLM")
        row = json.dumps({"input_ids": list(range(3, 15)), "labels": list(range(3, 15))})
        (folder / "rows.jsonl").write_text(f"{row}\n" * 8)
        print("| method | | processor seconds | seconds |\n| --- | --- | --- | --- |")
        for method in ("full", "lora"):
            words = [
                *(f"run_name={method}", "model=model", "data=tokens", "data.train=rows.jsonl", "data.cache_dir=cache"),
                *("task.max_length=16", f"method={method}", "train.max_steps=1", "train.global_batch_size=8"),
                *("train.resume=auto", "launch.workers_per_node=1", "track=off"),
            ]
            ours = [sys.executable, "-m", "dist_ft.launch.cli", "train", *words]
            bare = [sys.executable, "-c", BARE, "model", method, f"{method}-bare.jsonl"]
            found: dict[str, list[tuple[float, float]]] = {"dist-ft": [], "bare": []}
            for repeat in range(repeats + 1):
                words[0] = f"run_name={method}-{repeat}"
                ours[-len(words) :] = words
                run = folder / "runs" / f"{method}-{repeat}" / "metrics.jsonl"
                found["dist-ft"].append(measure(ours, folder, run))
                found["bare"].append(measure(bare, folder, folder / f"{method}-bare.jsonl"))
            least = {side: [min(column) for column in zip(*times[1:], strict=True)] for side, times in found.items()}
            for side, (used, seconds) in least.items():
                print(f"| {method} | {side} | {used:.2f} | {seconds:.2f} |")
            ratios = [ours / bare for ours, bare in zip(least["dist-ft"], least["bare"], strict=True)]
            print(f"| {method} | ratio | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
