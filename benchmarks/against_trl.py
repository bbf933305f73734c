"""Compare the tokens per CPU-second of the default job (LoRA, SmolLM2-135M, support_desk) with TRL's SFTTrainer.

    pip install trl==1.16.0 && python benchmarks/against_trl.py --steps 6 --repeats 3

Both use the same tokenized rows and labels, model, adapter, global batch, micro-batch, optimizer, and one thread. They
run alternately, each in a process of its own; the first step is not counted. The losses of both are printed and must
agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GLOBAL_BATCH, MICRO_BATCH, LEARNING_RATE = 16, 4, 2e-4
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def prepare_rows(folder: Path) -> dict[str, str]:
    """Write the tokenized training rows as JSON Lines for both trainers."""
    from dist_ft.data.store.table import TokenTable
    from dist_ft.launch.composition.compose import compose
    from dist_ft.prepare import prepare

    prepared = prepare(compose([]).config)
    table = TokenTable.open(prepared.train.table)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(len(table)):
            row = {name: values.tolist() for name, values in table.example(i).items()}
            file.write(json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) + "\n")
    return {"rows": str(folder / "rows.jsonl"), "model": prepared.model_dir}


def run_ours(rows: str, model: str, steps: int, out: Path) -> dict[str, Any]:
    from recorded import train

    from dist_ft.launch.composition.compose import compose

    words = [
        f"data.train={rows}", "data.format=tokens", "data.validation=null", "data.test=null", "data.shuffle=false",
        f"model.name_or_path={model}", f"output_dir={out}", "track.wandb=off", "train.num_train_epochs=null",
        f"train.max_steps={steps}", f"train.global_batch_size={GLOBAL_BATCH}", "optim.lr_scheduler_type=constant",
        f"train.per_device_train_batch_size={MICRO_BATCH}", f"optim.learning_rate={LEARNING_RATE}",
        "optim.warmup_ratio=0", "launch.workers_per_node=1", *[f"method.{k}={v}" for k, v in LORA.items()],
    ]  # fmt: skip
    found = train(compose(words).config)
    tokens = [step["perf/tokens_per_second"] * step["perf/step_time_s"] for step in found]
    cpu_s = found[-1]["cpu_s"] - found[0]["cpu_s"]
    return {"losses": [step["train/loss"] for step in found], "tokens": sum(tokens[1:]), "cpu_s": cpu_s}


def run_trl(rows: str, model: str, steps: int, out: Path) -> dict[str, Any]:
    import peft
    import torch
    import trl
    from datasets import Dataset
    from recorded import cpu_seconds
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    data = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    data = (data * (1 + steps * GLOBAL_BATCH // len(data)))[: steps * GLOBAL_BATCH]
    masked = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in data
    ]
    marks: list[float] = []
    losses: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(cpu_seconds())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.SFTConfig(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=MICRO_BATCH, learning_rate=LEARNING_RATE,
        gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, max_grad_norm=1.0,
        completion_only_loss=True, weight_decay=0.0, dataloader_pin_memory=False, disable_tqdm=True, packing=False,
    )  # fmt: skip
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
        args=arguments,
        train_dataset=Dataset.from_list(masked),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            **LORA,
        ),
        callbacks=[Marks()],
    )
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in data[GLOBAL_BATCH:])
    return {"losses": losses, "tokens": tokens, "cpu_s": marks[-1] - marks[0]}


def measure(who: str, rows: str, model: str, steps: int) -> dict[str, Any]:
    """Run one trainer in a separate process and return its record."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--only", who, "--rows", rows, "--model", model, "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(
            [*command, "--out", folder], env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise SystemExit(result.stdout[-3000:] + result.stderr[-3000:])
        record: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
        return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "trl"])
    parser.add_argument("--rows")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.only:
        run = {"ours": run_ours, "trl": run_trl}[given.only]
        print(json.dumps(run(given.rows, given.model, given.steps, given.out)), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        source = prepare_rows(Path(folder))
        best: dict[str, float] = {}
        for repeat in range(given.repeats):
            for who in ("ours", "trl"):
                record = measure(who, **source, steps=given.steps)
                rate = record["tokens"] / record["cpu_s"]
                best[who] = max(best.get(who, 0.0), rate)
                losses = " ".join(f"{loss:.4f}" for loss in record["losses"])
                print(f"{repeat} {who:5} {rate:8.1f} tokens/CPU-s   losses {losses}", flush=True)
    print(f"ours {best['ours']:.1f}, TRL {best['trl']:.1f} tokens/CPU-s; ratio {best['ours'] / best['trl']:.2f}")


if __name__ == "__main__":
    main()
