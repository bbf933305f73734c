"""Tests of written configurations: read again, every experiment plans the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_ft.launch.composition.compose import list_groups
from dist_ft.launch.planning import plan_run
from dist_ft.launch.show import config_text
from tests.unit.launch.plans import ROWS, SITE

NEEDS = {"wikitext_cpt": ["data.train=rows.jsonl"], "zero3_full": ["data=jsonl", "data.train=rows.jsonl"]}
OWN = [
    ["data=rows.jsonl", "train.max_steps=5", "method=full", "track=off"],
    ["model=Qwen/Qwen3-0.6B", "data=rows.jsonl", "data.validation=10%", "run_name=a"],
    ["data=mixture", "data.mixture.a.train=rows.jsonl", "data.mixture.b.train=[rows.jsonl]", "output_dir=x/y"],
    ["method=qlora", "model.dtype=bfloat16", "optim.betas=[0.8,0.9]", "method.rank_pattern={q_proj: 4}"],
    ["task=seq2seq", "data=rows.jsonl", 'task.source_prefix="summarize: "'],
    ["launch=slurm", "launch.workers_per_node=2", "launch.setup=[module load cuda]", "train.global_batch_size=8"],
    [],
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS * 3)
    return tmp_path


@pytest.mark.parametrize(
    "words", [*([f"experiment={name}", *NEEDS.get(name, [])] for name in list_groups()["experiment"]), *OWN], ids=str
)
def test_read_again_it_plans_the_same(words: list[str], folder: Path) -> None:
    site = replace(SITE, devices=tuple(range(6)))
    plan, launcher = plan_run(words, None, site)
    text = config_text(plan, words, None)
    (folder / "again.yaml").write_text(text)
    again, _ = plan_run(["again.yaml"], None, site)
    assert again.config == plan.config
    assert again.accumulation_steps == plan.accumulation_steps
    assert launcher.render(again) == launcher.render(plan)
    assert config_text(again, ["again.yaml"], None) == text


def test_batch_sizes_that_were_not_set_still_adapt(folder: Path) -> None:
    plan, _ = plan_run([], None, replace(SITE, devices=tuple(range(6))))
    (folder / "again.yaml").write_text(config_text(plan, [], None))
    elsewhere = replace(SITE, devices=(0, 1, 2))
    again, _ = plan_run(["again.yaml"], None, elsewhere)
    assert again.config == plan_run([], None, elsewhere)[0].config
    assert again.config.train.per_device_train_batch_size != plan.config.train.per_device_train_batch_size


def test_every_key_is_there_as_value_or_comment(folder: Path) -> None:
    plan, _ = plan_run([], None, SITE)
    text = config_text(plan, [], None)
    bare = yaml.safe_load("\n".join(line.removeprefix("# ").replace("  # ", "  ") for line in text.splitlines()))
    tree = plan.config.model_dump(mode="json")
    assert bare.keys() == tree.keys()
    assert {section: set(keys) for section, keys in bare.items() if isinstance(keys, dict)} == {
        section: set(keys) for section, keys in tree.items() if isinstance(keys, dict)
    }


def test_files_of_own_groups_are_written_out(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "mine.yaml").write_text("name_or_path: a/b\ndropout: 0.1\n")
    plan, _ = plan_run(["model=mine"], folder, SITE)
    (folder / "again.yaml").write_text(config_text(plan, ["model=mine"], folder))
    assert plan_run(["again.yaml"], None, SITE)[0].config == plan.config


def test_a_secret_is_not_written() -> None:
    words = ["privacy.noise_multiplier=1.0", "privacy.noise_seed=123456"]
    plan, _ = plan_run(words, None, SITE)
    assert "123456" not in config_text(plan, words, None)
