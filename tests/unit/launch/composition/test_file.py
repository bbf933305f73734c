"""Tests of configurations in one YAML file: what its sections mean, lines in errors, and files of runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from dist_ft.config.plan import write_plan
from dist_ft.config.run import settings_of
from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import Composed, compose
from dist_ft.launch.composition.file import YamlLoader
from dist_ft.launch.planning import plan_run
from tests.unit.launch.plans import ROWS, SITE

GIVEN = """\
run_name: first
model: Qwen/Qwen3-0.6B
task: {name: instruction, max_length: 1024}
data:
  train: rows.jsonl
  validation: 10%
method:
  name: lora
  r: 32
optim: {learning_rate: 1e-4}
track: off
"""
SAME = [
    *("run_name=first", "model=Qwen/Qwen3-0.6B", "task=instruction", "task.max_length=1024", "data=rows.jsonl"),
    *("data.validation=10%", "method=lora", "method.r=32", "optim.learning_rate=1e-4", "track=off"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS * 40)
    return tmp_path


def read(text: str, *words: str) -> Composed:
    Path("given.yaml").write_text(text)
    return compose(["given.yaml", *words])


def problems(text: str, *words: str) -> dict[str, str]:
    with pytest.raises(RequestError) as caught:
        read(text, *words)
    return {problem.where: f"{problem.rule} → {problem.way_out}" for problem in caught.value.problems}


def test_a_file_says_the_same_as_words() -> None:
    composed = read(GIVEN)
    assert composed.config == compose(SAME).config
    assert composed.origins["method.r"] == "given.yaml:9"
    assert composed.origins["method"] == "given.yaml:7: method=lora"
    assert composed.origins["model.name_or_path"] == "given.yaml:2"
    assert "method.lora_alpha" not in composed.origins


def test_words_win_over_the_file_and_the_file_over_its_experiment() -> None:
    text = "experiment: quickstart\ntask: {max_length: 99}\ntrain: {max_steps: 7}\n"
    config = read(text, "method.r=4").config
    assert (config.method.r, config.method.lora_alpha) == (4, 32)  # type: ignore[union-attr]
    assert (config.task.max_length, config.train.global_batch_size) == (99, 16)
    assert (config.train.max_steps, config.train.num_train_epochs) == (7, None)
    assert read(text, "train.num_train_epochs=1").config.train.max_steps is None
    assert read(text, "train.max_steps=9").config.train.max_steps == 9


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("data: {train: rows.jsonl, format: messages}", ["data=rows.jsonl", "data.format=messages"]),
        ("data: {train: a/b}", ["data=a/b"]),
        ("data: {train: [rows.jsonl]}", ["data=jsonl", "data.train=[rows.jsonl]"]),
        ("data: support_desk", ["data=support_desk"]),
        ("data: {name: support_desk, max_rows: 8}", ["data=support_desk", "data.max_rows=8"]),
        ("data: {mixture: {a: {train: rows.jsonl}}}", ["data=mixture", "data.mixture.a.train=rows.jsonl"]),
        ("model: {name_or_path: a/b}", ["model=a/b"]),
        ("model: {name: qwen, dtype: float32}", ["model=qwen", "model.dtype=float32"]),
        ("model: {dropout: 0.1}", ["model.dropout=0.1"]),
        ("track: {wandb: off, project: p}", ["track.wandb=off", "track.project=p"]),
        ("output_dir: runs/${train.seed}", ["output_dir=runs/${train.seed}"]),
        ("optim: {betas: [0.9, 0.95]}", ["optim.betas=[0.9,0.95]"]),
        ("", []),
    ],
)
def test_forms_of_a_section(section: str, words: list[str]) -> None:
    assert read(section).config == compose(words).config


def test_every_problem_names_its_line() -> None:
    found = problems(
        "model:\n  name: smolm2\n  dtpe: x\nlearning_rate: 1e-3\nmethod: {name: lora, lora_r: 8,\n  r: x}\nmoe: 3\n"
        "data:\n  mixture:\n    a: {train: rows.jsonl,\n      weigth: 1}\ntrain: {bf16: true}\ndefaults: [a]\n"
        "engine:\ntrain.seed: 3\ntask: [instruction]\n",
        "lora_alfa=3",
    )
    wanted = {
        "model (given.yaml:2)": "model has no choice 'smolm2' → did you mean smollm2?",
        "model.dtpe (given.yaml:3)": "did you mean model.dtype?",
        "learning_rate (given.yaml:4)": "did you mean optim.learning_rate?",
        "method.lora_r (given.yaml:5)": "did you mean method.r?",
        "method.r (given.yaml:6)": "'x' is invalid",
        "moe (given.yaml:7)": "must be keys → write `moe: {KEY: VALUE}`",
        "data.mixture.a.weigth (given.yaml:11)": "did you mean data.mixture.a.weight?",
        "train.bf16 (given.yaml:12)": "set model.dtype=bfloat16",
        "defaults (given.yaml:13)": "is not used in this file",
        "engine (given.yaml:14)": "is empty",
        "train.seed (given.yaml:15)": "keys have no dots → write seed below train:",
        "task (given.yaml:16)": "must be a name → known: causal_lm, instruction",
        "lora_alfa (command line)": "unknown key",
    }
    for where, text in wanted.items():
        assert text in found.pop(where, ""), (where, found)
    assert found == {}


@pytest.mark.parametrize(
    ("text", "where", "rule"),
    [
        ("model: a/b\ntask: {name: instruction}\nmodel: c/d\n", "model (given.yaml:3)", "is already at given.yaml:1"),
        ("train:\n  seed: 1\n  seed: 2\n", "train.seed (given.yaml:3)", "is already at given.yaml:2"),
        ("data:\n  mixture:\n    a: {train: x}\n    a: {train: y}\n", "data.mixture.a (given.yaml:4)", "is already at"),
        ("model: [\n", "given.yaml:2", "is not valid YAML: while parsing a flow node"),
        ("- model\n", "given.yaml:1", "is not a mapping"),
        ("model: !!python/object/apply:os.system [ls]\n", "given.yaml:1", "is not valid YAML: could not determine"),
    ],
)
def test_broken_files(text: str, where: str, rule: str) -> None:
    assert rule in problems(text)[where]


def test_a_missing_file_and_several_files() -> None:
    for words, rule in (["none.yaml"], "cannot be read"), (["a.yaml", "b.yml"], "only one file"):
        with pytest.raises(RequestError, match=rule):
            compose(words)


def test_another_choice_replaces_the_section_and_names_what_is_left_out() -> None:
    composed = read(GIVEN, "method=full", "data=dolly")
    assert composed.config.method.name == "full"
    assert composed.config.data.train == "databricks/databricks-dolly-15k"
    assert composed.config.data.validation is None
    left_out = {key: origin for key, origin in composed.origins.items() if origin.startswith("left out")}
    assert left_out == {
        "method.r": "left out: given.yaml:9 is replaced by method=full",
        "data.train": "left out: given.yaml:5 is replaced by data=dolly",
        "data.validation": "left out: given.yaml:6 is replaced by data=dolly",
    }
    assert read(GIVEN, "method=lora").config.method.r == 32  # type: ignore[union-attr]


def test_a_replaced_train_takes_the_validation_of_the_file_with_it() -> None:
    composed = read(GIVEN, "data.train=a/b")
    assert composed.config.data.validation is None
    assert composed.origins["data.validation"] == "left out: that of given.yaml:6 belongs to its own data.train"


def test_batch_sizes_of_an_own_folder_conf_are_set_by_the_user(folder: Path) -> None:
    (folder / "conf").mkdir()
    (folder / "conf/mine.yaml").write_text("train: {global_batch_size: 32}\n")
    with pytest.raises(RequestError, match="cannot be divided"):
        plan_run(["conf/mine.yaml", "launch.workers_per_node=3"], None, SITE)


def test_the_file_of_a_run_repeats_it(folder: Path) -> None:
    plan, _ = plan_run([*SAME, "launch.workers_per_node=3"], None, SITE)
    file = str(write_plan(plan).relative_to(folder))
    again, _ = plan_run([file], None, SITE)
    assert again.config == plan.config
    chosen_for_it = {"train.global_batch_size", "model.dtype"}  # not by the user
    assert {key for key in again.origins if "." in key} == {key for key in plan.origins if "." in key} - chosen_for_it
    assert again.origins["method.r"].startswith("runs/first/run.yaml:")
    fewer, _ = plan_run([file, "launch.workers_per_node=5", "run_name=second"], None, SITE)
    assert fewer.config.train.global_batch_size % 5 == 0
    assert fewer.run_dir == folder / "runs" / "second"
    assert settings_of(plan_run([file, "run_name=third"], None, SITE)[0].config) == settings_of(plan.config)


def test_the_quantization_of_a_repeated_run_follows_its_method() -> None:
    plan, _ = plan_run(["run_name=first", "data=rows.jsonl"], None, SITE)
    assert plan.config.model.quantization == "none"
    file = str(write_plan(plan))
    config = compose([file, "method=qlora", "run_name=second"]).config
    assert config.model.quantization == "nf4"
    content = yaml.safe_load(Path(file).read_text())
    Path(file).write_text(yaml.safe_dump({**content, "config": None}))
    with pytest.raises(RequestError, match="is not the run"):
        compose([file])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("4:00:00", "4:00:00"), ("1:30", "1:30"), ("2-00:00:00", "2-00:00:00"), ("20", 20), ("-3", -3), ("0", 0)),
        *(("1_000", 1000), ("0x10", 16), ("010", 8), ("1.5", 1.5), ("1e-3", 1e-3), ("1.5e+3", 1500.0), (".5", 0.5)),
        *(
            ("1.", 1.0),
            ("-.inf", -math.inf),
            ("on", "on"),
            ("true", True),
            ("1.2.3", "1.2.3"),
            ("2026-11-30x", "2026-11-30x"),
        ),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    """Times are texts: YAML 1.1 reads 4:00:00 as the number 14400."""
    found = yaml.load(f"key: {text}", YamlLoader)["key"]
    assert (type(found), found) == (type(value), value)


def test_a_time_limit_is_a_text_or_minutes(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    for text, value in (("4:00:00", "4:00:00"), ("20", 20)):
        file.write_text(f"launch: {{name: slurm, workers_per_node: 1, time: {text}}}\n")
        assert compose([str(file)]).config.launch.time == value
    assert compose(["launch=slurm", "launch.workers_per_node=1", "launch.time=20"]).config.launch.time == 20
