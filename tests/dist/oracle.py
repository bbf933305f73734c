"""The oracle of the parity matrix: a plain PyTorch loop over transformers' model, without anything of dist_ft."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


def next_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    """Rows in file order, put together while they fit."""
    packs: list[list[int]] = []
    room = 0
    for row, length in enumerate(lengths):
        if length > room:
            packs.append([])
            room = max_length
        packs[-1].append(row)
        room -= length
    return packs


def steps_of(rows: list[dict], *, batch: int, steps: int, max_length: int | None) -> list[list[dict]]:
    """The rows of each step in file order, begun anew after the last; with `max_length`, `batch` counts packs."""
    packs = (
        [[i] for i in range(len(rows))]
        if max_length is None
        else next_fit([len(r["input_ids"]) for r in rows], max_length)
    )
    return [
        [rows[i] for p in range(step * batch, (step + 1) * batch) for i in packs[p % len(packs)]]
        for step in range(steps)
    ]


def train_plainly(
    folder: str, step_rows: list[list[dict]], *, learning_rate: float, weight_decay: float, max_norm: float
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One sequence at a time, loss over the supervised tokens of the whole step, linear decay; full fine-tuning."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        foreach=False,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / len(step_rows))
    losses, norms = [], []
    for rows in step_rows:
        supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
        step_loss = 0.0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            loss = cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100) / supervised
            loss.backward()
            step_loss += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        losses.append(step_loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}
