"""The model card says what was done, and its three lines load the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dist_ft.card import render_card
from dist_ft.plan import Plan
from dist_ft.schema import RunConfig
from dist_ft.state import Facts

LEDGER = {"rows_read": 1200, "rows_kept": 1199, "tokens": 34567, "supervised_tokens": 8901}


def make_plan(method: dict[str, Any]) -> Plan:
    config = RunConfig.model_validate(
        {
            "run_name": "desk",
            "output_dir": "runs/desk",
            "model": {"name_or_path": "org/some-model", "revision": "abc123"},
            "task": {"name": "instruction"},
            "data": {"train": ["a|b.jsonl", "c.jsonl"]},
            "method": method,
            "engine": {"name": "zero2"},
            "optim": {"learning_rate": 0.0005},
            "train": {"max_steps": 60},
            "track": {},
            "launch": {"name": "slurm", "workers_per_node": 2, "setup": ["export SECRET=x"]},
        }
    )
    return Plan(
        config=config, nodes=1, workers_per_node=2, world_size=2, accumulation_steps=1, git_sha="f00",
        created="2026-01-01", origins={},
    )  # fmt: skip


def make_card(method: dict[str, Any], **options: Any) -> str:
    split = SimpleNamespace(table="/somewhere/data/0123abcd", ledger=LEDGER)
    prepared: Any = SimpleNamespace(model_dir="/somewhere/m", train=split, validation=None, test=None, facts=Facts())
    before, after = {"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.0}, {"step": 60, "eval/loss": 1.23456}
    return render_card(make_plan(method), prepared, before, after, **options)


def test_it_says_data_method_numbers_and_versions() -> None:
    card = make_card({"name": "lora", "r": 7})
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/some-model" and front["library_name"] == "peft"
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line.startswith("|")
    ]
    assert ["train", "`a\\|b.jsonl`, `c.jsonl`", "1,199 of 1,200", "34,567", "8,901", "`0123abcd`"] in rows
    assert ["validation", "step 0", "step 60"] in rows
    assert ["eval/loss", "3.0000", "1.2346"] in rows and ["eval/exact_match", "0.0000", ""] in rows
    for wanted in (["`method.r`", "7"], ["`optim.learning_rate`", "0.0005"], ["`train.max_steps`", "60"]):
        assert wanted in rows
    assert ["torch", torch.__version__.split("+")[0]] in [[row[0], row[-1].split("+")[0]] for row in rows]
    assert ["git", "f00"] in rows and ["`model.revision`", "abc123"] in rows
    assert "SECRET" not in card


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ({"name": "full"}, {}, "A fully fine-tuned model"),
        ({"name": "lora"}, {"merged": True}, "A LoRA merged adapter"),
        ({"name": "lora"}, {"checkpoint": "step-5"}, "checkpoint `step-5`"),
    ],
)
def test_what_it_is(method: dict[str, Any], options: dict[str, Any], kind: str) -> None:
    assert kind in make_card(method, **options)
