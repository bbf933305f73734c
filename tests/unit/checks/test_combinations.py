"""Choices that do not go together are refused with the reason."""

from __future__ import annotations

import pytest

from dist_ft.checks.request import check
from dist_ft.launch.composition.compose import compose
from tests.unit.checks.found import found


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


def test_length_is_given_once():
    assert (
        "only one can be used"
        in found("train.max_steps=3", "train.num_train_epochs=1")["train.max_steps (command line)"]
    )
    assert "length of the run is not set" in found("train.num_train_epochs=null")["train"]


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
