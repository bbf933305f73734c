"""Tests that compose, check and plan every YAML file in conf/."""

import re
from pathlib import Path

import pytest
import yaml

from dist_ft.config.run import RunConfig
from dist_ft.launch.composition.compose import compose, list_groups
from dist_ft.launch.composition.keys import members, names
from dist_ft.launch.composition.paths import CONF_DIR
from dist_ft.launch.machine.environ import Site
from dist_ft.launch.planning import plan_run

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "text": "x"}\n'
FILES = sorted(CONF_DIR.glob("*/*.yaml"))
NEEDS = {  # required arguments of the files that have no value for a required key
    "task/causal_lm": ["data=text", "data.train=rows.jsonl"],
    "task/masked_lm": ["data=text", "data.train=rows.jsonl"],
    "task/question_answering": ["data=jsonl", "data.train=rows.jsonl"],
    "task/preference": ["data=jsonl", "data.train=rows.jsonl"],
    "task/reward": ["data=jsonl", "data.train=rows.jsonl"],
    "task/seq2seq": ["data=jsonl", "data.train=rows.jsonl"],
    "task/sequence_classification": ["data=jsonl", "data.train=rows.jsonl"],
    "task/token_classification": ["data=jsonl", "data.train=rows.jsonl"],
    "model/hub": ["model.name_or_path=a/b"],
    "data/jsonl": ["data.train=rows.jsonl"],
    "data/text": ["data.train=rows.jsonl", "task=causal_lm"],
    "data/hub": ["data.train=a/b"],
    "data/mixture": ["data.mixture.a.train=rows.jsonl"],
    "data/tokens": ["data.train=rows.jsonl"],
    "launch/deepspeed": ["launch.hostfile=hosts"],
    "launch/slurm": ["launch.workers_per_node=2"],
    "experiment/wikitext_cpt": ["data.train=rows.jsonl"],
    "experiment/zero3_full": ["data=jsonl", "data.train=rows.jsonl"],
}


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_composes_checks_and_plans(file, tmp_path):
    words = [f"{file.parent.name}={file.stem}", *NEEDS.get(name_of(file), ())]
    plan, launcher = plan_run(words, None, Site(python="/opt/python", cwd=str(tmp_path), cores=4))
    train = plan.config.train
    assert plan.accumulation_steps * plan.world_size * train.per_device_train_batch_size == train.global_batch_size
    assert launcher.render(plan).files


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("name", ["", *(file.stem for file in FILES if file.parent.name == "experiment")])
def test_runs_on_any_number_of_gpus(name, gpus, tmp_path):
    words = [f"experiment={name}", *NEEDS.get(f"experiment/{name}", ())] if name else []
    site = Site(python="/opt/python", cwd=str(tmp_path), cores=4, devices=tuple(range(gpus)))
    plan, _ = plan_run(words, None, site)
    wanted, train = compose(words).config.train, plan.config.train
    assert plan.world_size == gpus
    assert plan.accumulation_steps * gpus * train.per_device_train_batch_size == train.global_batch_size
    assert 1 <= train.per_device_train_batch_size <= wanted.per_device_train_batch_size
    assert abs(train.global_batch_size - wanted.global_batch_size) * 8 <= wanted.global_batch_size
    if wanted.global_batch_size % gpus == 0:
        assert train.global_batch_size == wanted.global_batch_size
    for key in ("global_batch_size", "per_device_train_batch_size"):
        changed = getattr(train, key) != getattr(wanted, key)
        assert plan.origins.get(f"train.{key}", "").startswith("auto: ") == changed


@pytest.mark.parametrize("file", [CONF_DIR / "train.yaml", *FILES], ids=name_of)
def test_opens_with_a_sentence_and_the_command_that_uses_it(file):
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert "`dist-ft " in first
    if file.parent != CONF_DIR:
        assert f"{file.parent.name}={file.stem}" in first or file.stem in NEEDS


def test_holds_no_target_and_no_resolver():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\b_target_\b", text)
        assert "${" not in text
        assert isinstance(yaml.safe_load(text), dict)


def test_groups_are_those_of_the_schema():
    groups = list_groups()
    assert groups["task"] == sorted(n for r in members(RunConfig.model_fields["task"].annotation) for n in names(r))
    assert groups["method"] == sorted(n for r in members(RunConfig.model_fields["method"].annotation) for n in names(r))
    assert groups["engine"] == ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    assert groups["launch"] == ["deepspeed", "local", "slurm"]
    assert set(groups) == {"model", "task", "data", "method", "engine", "optim", "track", "launch", "experiment"}
