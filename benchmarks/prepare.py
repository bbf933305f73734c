"""Compare the rows per CPU-second and the memory of preparation with `datasets.map` and a chat template function.

    python benchmarks/prepare.py --model FOLDER --rows 1000 10000 100000 --processes 1

FOLDER has a tokenizer with a chat template. Rows are conversations of one turn with random words. The other side is the
function that trainers pass to `datasets.map` (`apply_chat_template` with `return_assistant_tokens_mask`, as TRL's
SFTTrainer with `assistant_only_loss`), for a template with generation marks; the numbers of tokens and of supervised
tokens of both have to be equal. Each runs in a process of its own; loading libraries and the tokenizer is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the model reads every row of a data set and writes what it learns into a table on the disk of each machine"


def write_rows(path: Path, count: int) -> None:
    dice, words = random.Random(0), WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = (" ".join(dice.choices(words, k=dice.randint(10, most))) for most in (60, 90))
            messages = [{"role": "user", "content": f"{number} {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def run_ours(rows: Path, model: str, processes: int, folder: Path) -> dict[str, Any]:
    from dist_ft.config.run import RunConfig
    from dist_ft.prepare import prepare

    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")

    def config(path: Path) -> RunConfig:
        content: dict[str, Any] = {
            "run_name": "prepare", "output_dir": str(folder), "model": {"name_or_path": model},
            "task": {"name": "instruction", "max_length": 4096, "chat_template": str(folder / "template.jinja")},
            "data": {"train": str(path), "cache_dir": str(folder / "cache"), "num_proc": processes},
            "method": {"name": "full"}, "engine": {"name": "ddp"}, "optim": {}, "track": {}, "train": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }  # fmt: skip
        return RunConfig.model_validate(content)

    write_rows(folder / "first.jsonl", 10)
    prepare(config(folder / "first.jsonl"))
    with measured() as record:
        split = prepare(config(rows)).train
    return {**record, "tokens": split.ledger["tokens"], "supervised": split.ledger["supervised_tokens"]}


def run_map(rows: Path, model: str, processes: int, folder: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = tokenizer.apply_chat_template(row["messages"], **options)
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with measured() as record:
        loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
        made = loaded.map(encode, num_proc=processes if processes > 1 else None, remove_columns=["messages"])
    supervised = sum(sum(row["assistant_masks"]) for row in made)
    return {**record, "tokens": sum(len(row["input_ids"]) for row in made), "supervised": supervised}


class measured:  # noqa: N801
    """Context that measures the wall time, the CPU time with child processes, and the peak memory of this process."""

    def __enter__(self) -> dict[str, float]:
        self.record: dict[str, float] = {}
        self.wall, self.cpu = time.monotonic(), cpu_seconds()
        return self.record

    def __exit__(self, *_: object) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.record["wall_s"] = time.monotonic() - self.wall
        self.record["cpu_s"] = cpu_seconds() - self.cpu
        self.record["memory_mib"] = usage.ru_maxrss / 1024


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all that it started, also of those that a running one has started."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ended = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))
    running = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return ended + sum(t.user + t.system + t.children_user + t.children_system for t in running)


def measure(who: str, rows: Path, model: str, processes: int) -> dict[str, Any]:
    """Run one side in a separate process and return its record."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--only", who, "--model", model, "--processes", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(
            [*command, "--file", str(rows), "--folder", folder],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(result.stdout[-3000:] + result.stderr[-3000:])
        record: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
        return record


def lines(model: str, counts: list[int], processes: int) -> Iterator[str]:
    yield "| rows | who | rows/CPU-s | rows/s | peak memory of the main process, MiB |"
    yield "| --- | --- | --- | --- | --- |"
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            write_rows(rows, count)
            found = {who: measure(who, rows, model, processes) for who in ("ours", "map")}
        same = {(record["tokens"], record["supervised"]) for record in found.values()}
        if len(same) > 1:
            raise SystemExit(f"the tokens and supervised tokens differ: {found}")
        for who, record in found.items():
            rates = f"{count / record['cpu_s']:.0f} | {count / record['wall_s']:.0f}"
            yield f"| {count:,} | {who} | {rates} | {record['memory_mib']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "map"])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.only:
        run = {"ours": run_ours, "map": run_map}[given.only]
        print(json.dumps(run(given.file, given.model, given.processes, given.folder)), flush=True)
        return
    for line in lines(given.model, given.rows, given.processes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
