import subprocess
import sys

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import COMMAND_LINE, LEFT_OUT, compose
from dist_ft.launch.composition.paths import CONF_DIR


def problems(*words, config_dir=None):
    with pytest.raises(RequestError) as caught:
        compose(words, config_dir)
    return {problem.where: f"{problem.rule} → {problem.way_out}" for problem in caught.value.problems}


def test_the_default_is_whole_and_nothing_counts_as_set():
    composed = compose([])
    assert composed.config.method.name == "lora"
    assert composed.config.run_name == "instruction-lora-ddp"
    assert composed.config.output_dir.endswith("/runs/instruction-lora-ddp")
    assert composed.config.data.train.endswith("dist_ft/data/support_desk/train.jsonl")
    assert composed.config.data.train.startswith("/")
    assert composed.origins == {}


def test_every_problem_is_reported_at_once():
    found = problems(
        "data=jsonl",
        "engine=zero4",
        "enigne=fsdp",
        "train.max_step=3",
        "method=full",
        "method.r=3",
        "model.dtype=float16",
        "train.seed=abc",
        "launch.port=99999",
        "+x=1",
        "~train.seed",
        "~track",
        "hydra.run.dir=x",
        "hydra/launcher=basic",
        "method/x=3",
        "train.logging_steps=1,2",
        "optim.name=adam",
        "a b",
        "data.train.x=3",
    )
    wanted = {
        "engine=zero4": "did you mean engine=zero3? known: ddp, fsdp, zero1, zero2, zero3",
        "enigne (command line)": "unknown key → did you mean engine?",
        "train.max_step (command line)": "unknown key → did you mean train.max_steps?",
        "method.r (command line)": "belongs to method=lora or method=qlora and is not supported with method=full",
        "model.dtype (command line)": "'float16' is invalid: it must be one of auto, float32, bfloat16",
        "train.seed (command line)": "'abc' is invalid: it must be a valid integer",
        "launch.port (command line)": "99999 is invalid: it must be less than or equal to 65535",
        "+x=1": "keys cannot be added to the schema → write x=1",
        "~train.seed": "cannot be deleted",
        "~track": "groups cannot be deleted → set track=CHOICE",
        "hydra.run.dir=x": "settings of Hydra are not used",
        "hydra/launcher=basic": "settings of Hydra are not used",
        "method/x=3": "unknown group",
        "train.logging_steps=1,2": "use `dist-ft sweep`",
        "optim.name=adam": "write optim=adam",
        "a b": "cannot be parsed",
        "data.train": "is required → set data.train=VALUE",
    }
    for where, text in wanted.items():
        assert text in found.pop(where)
    assert [where.split(" ")[0] for where in found] == ["data.train.x"]


def test_a_forced_word_is_a_word_and_stays_within_the_schema():
    assert compose(["++method.r=4", "++engine=fsdp"]).config == compose(["method.r=4", "engine=fsdp"]).config
    assert "unknown key" in problems("++method.rr=4")["method.rr (command line)"]


@pytest.mark.parametrize("name", ["../../x", "-x", "a b", "", "x" * 121, "a/b", "$(id)"])
def test_a_run_name_cannot_leave_the_folder(name):
    assert "run_name" in next(iter(problems(f'run_name="{name}"')))


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x${oc.env:WANDB_API_KEY,none}", "${oc.decode:1}", "${hydra:job}"])
def test_nothing_from_outside_is_interpolated(value):
    assert (
        "from outside the configuration"
        in problems(f"'track.project=\"{value}\"'".strip("'"))[f"track.project ({COMMAND_LINE})"]
    )


def test_keys_may_name_other_keys():
    assert compose(["train.seed=7", "track.project=seed-${train.seed}"]).config.track.project == "seed-7"
    assert "not found" in problems("track.project=${train.sed}")["${…}"]


def test_origins_name_the_command_line_and_the_experiment():
    origins = compose(["experiment=dolly_lora", "method.r=4", "train.num_train_epochs=2"]).origins
    assert origins["method.r"] == "command line"
    assert origins["train.global_batch_size"] == "conf/experiment/dolly_lora.yaml"
    assert origins["train.num_train_epochs"] == "command line"
    assert origins["experiment"] == "command line: experiment=dolly_lora"
    assert "method.lora_alpha" not in origins


def test_a_typed_length_replaces_a_default_or_an_experiments():
    assert compose(["train.max_steps=5"]).config.train.num_train_epochs is None
    typed = compose(["experiment=dolly_lora", "train.max_steps=5"])
    assert typed.config.train.num_train_epochs is None
    assert "train.num_train_epochs" not in typed.origins
    both = compose(["train.max_steps=5", "train.num_train_epochs=1"]).config.train
    assert (both.max_steps, both.num_train_epochs) == (5, 1)


def test_command_line_choices_win_over_an_experiments():
    config = compose(["experiment=dolly_lora", "engine=zero2", "data=jsonl", "data.train=x.jsonl"]).config
    assert (config.engine.name, config.data.train, config.model.name_or_path) == ("zero2", "x.jsonl", "Qwen/Qwen3-0.6B")


SUPPORT_DESK = "left out: that of conf/data/support_desk.yaml belongs to its own data.train"
SST2 = "left out: that of conf/experiment/sentiment_distilbert.yaml belongs to its own data.train"
EXPERIMENT = "experiment=sentiment_distilbert"  # sets train, validation and test


@pytest.mark.parametrize(
    ("words", "splits", "why"),
    [
        (["data.train=a.jsonl"], {}, SUPPORT_DESK),
        (["data.train=[a.jsonl, b.jsonl]"], {}, SUPPORT_DESK),
        (["data=support_desk", "data.train=a.jsonl"], {}, SUPPORT_DESK),
        (["data.train=a.jsonl", "data.validation=b.jsonl"], {"validation": "b.jsonl"}, SUPPORT_DESK),
        (["data.train=a.jsonl", "data.validation=null", "data.test=c.jsonl"], {"test": "c.jsonl"}, None),
        (["experiment=quickstart", "data.train=a.jsonl"], {}, SUPPORT_DESK),
        ([EXPERIMENT, "data.train=a.jsonl"], {}, SST2),
        ([EXPERIMENT, "data=jsonl", "data.train=a.jsonl"], {}, SST2),
        ([EXPERIMENT, "data.train=a/b", "data.validation=a/b:/dev"], {"validation": "a/b:/dev"}, SST2),
        (["data=jsonl", "data.train=a.jsonl", "data.validation=b.jsonl"], {"validation": "b.jsonl"}, None),
    ],
)
def test_a_replaced_train_takes_the_other_splits_with_it(words, splits, why):
    composed = compose(words)
    assert {split: getattr(composed.config.data, split) for split in ("validation", "test")} == {
        "validation": None,
        "test": None,
        **splits,
    }
    told = {key: origin for key, origin in composed.origins.items() if origin != COMMAND_LINE and "data." in key}
    unset = [key for key in ("data.validation", "data.test") if not any(word.startswith(key) for word in words)]
    assert told == (dict.fromkeys(unset, why) if why else {})


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data.validation=b.jsonl"],
        ["data.format=messages"],
        ["experiment=quickstart"],
        [EXPERIMENT],
        ["data=dolly"],
    ],
)
def test_splits_stay_with_their_own_train(words):
    composed = compose(words)
    assert not any(origin.startswith(LEFT_OUT) for origin in composed.origins.values())
    if words != ["data=dolly"]:
        assert composed.config.data.validation and composed.config.data.test


def test_an_own_choice_of_data_keeps_its_splits(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("train: a.jsonl\nvalidation: b.jsonl\n")
    assert compose(["data=mine"], tmp_path).config.data.validation == "b.jsonl"
    composed = compose(["data=mine", "data.train=c.jsonl"], tmp_path)
    assert composed.config.data.validation is None
    assert composed.origins["data.validation"].startswith(f"{LEFT_OUT}: that of {tmp_path}/data/mine.yaml")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "other.yaml").write_text("data:\n  train: d.jsonl\n")
    composed = compose(["data=mine", "experiment=other"], tmp_path)
    assert (composed.config.data.train, composed.config.data.validation) == ("d.jsonl", None)


def test_own_groups_are_found_and_their_mistakes_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name_or_path: gpt2\ndtype: bfloat16\n")
    composed = compose(["model=mine"], tmp_path)
    assert composed.config.model.name_or_path == "gpt2"
    assert composed.origins["model.dtype"] == str(tmp_path / "model" / "mine.yaml")
    (tmp_path / "model" / "mine.yaml").write_text("name_or_path: gpt2\ndtpe: x\n")
    found = problems("model=mine", config_dir=tmp_path)
    assert found == {f"model.dtpe ({tmp_path}/model/mine.yaml)": "unknown key → did you mean model.dtype?"}
    assert "does not exist" in problems(config_dir=tmp_path / "none")[f"--config-dir {tmp_path / 'none'}"]


def test_broken_own_yaml_is_the_users_fault(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("a: [\n")
    assert "cannot be composed" in problems("model=mine", config_dir=tmp_path)[str(tmp_path)]


def test_target_names_no_code():
    assert "unknown key" in problems("model._target_=os.system")["model._target_ (command line)"]


def test_existing_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    config = compose(["data=jsonl", 'data.train=[rows.jsonl, "*.jsonl", a/b]', "model.name_or_path=a/b"]).config
    assert config.data.train == [f"{tmp_path}/rows.jsonl", f"{tmp_path}/*.jsonl", "a/b"]
    assert config.model.name_or_path == "a/b"
    (tmp_path / "own.jinja").write_text("")
    for task in ("instruction", "preference", "reward"):
        words = [f"task={task}", "task.chat_template=own.jinja", "data=jsonl", "data.train=rows.jsonl"]
        assert compose(words).config.task.chat_template == f"{tmp_path}/own.jinja"
    assert "Python package is not installed" in problems("data=jsonl", "data.train=package:none_such/x")["data.train"]


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(["experiment=quickstart"])
    assert list(tmp_path.iterdir()) == []


def test_no_torch_is_imported():
    code = "import sys, dist_ft.launch.composition.compose, dist_ft.checks, dist_ft.launch.local\n"
    code += "import dist_ft.launch.deepspeed, dist_ft.launch.slurm.launcher\n"
    code += "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONF_DIR.parents[1]
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.csv.zst", "books/*.txt", "folder"])
def test_a_source_stands_for_a_choice_of_data(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    given = compose([f"data={source}"])
    longer = compose(["data=jsonl", f"data.train={source}"])
    assert given.config == longer.config and given.origins == longer.origins
    assert given.config.data.validation is None
    with pytest.raises(RequestError, match="data has no choice 'support_dsk'"):
        compose(["data=support_dsk"])


@pytest.mark.parametrize("share", ["10%", "0.1"])
def test_a_share_of_the_training_rows_is_no_path(share):
    data = compose(["data=jsonl", "data.train=rows.jsonl", f"data.validation={share}"]).config.data
    assert (data.validation, data.sources("validation"), data.source_split("validation")) == (
        "10%",
        "rows.jsonl",
        "train",
    )
