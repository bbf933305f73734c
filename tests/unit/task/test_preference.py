"""Preference losses against TRL and plain PyTorch, tokenization of pairs, and the reference model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dist_ft.config.task import PreferenceConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.protocols import Refers
from dist_ft.state import REFERENCE, Batch, Sample
from dist_ft.task.preference import Preference
from dist_ft.testing import tiny
from dist_ft.testing.words import save_model

PROMPT = [{"role": "user", "content": "w1 w2"}]
CHATML = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make(*, padding_free: bool = True, **keys: Any) -> Preference:
    return Preference(PreferenceConfig(name="preference", **keys), padding_free=padding_free)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = save_model("llama", tmp_path_factory.mktemp("words"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    return ChatTokenizer(tokenizer)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_both_answers_follow_the_prompt_and_carry_the_loss(words: ChatTokenizer) -> None:
    chosen, rejected = make().encode({"prompt": PROMPT, "chosen": said("w3"), "rejected": said("w4 w5")}, words)
    alone = words.encode_messages([*PROMPT, *said("w3")])
    assert chosen == alone
    ids = words.tokenizer.convert_tokens_to_ids(["w4", "w5", "<eos>"])
    assert [label for label in rejected["labels"] if label != -100] == ids
    common = len(chosen["input_ids"]) - 2
    assert rejected["input_ids"][:common] == chosen["input_ids"][:common]
    text = make().encode({"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}, words)
    assert text == [words.encode_pair("w1 ", "w2"), words.encode_pair("w1 ", "w3")]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": PROMPT, "chosen": said("w3"), "rejected": said("w3")}, "the same"),
        ({"prompt": "w1", "chosen": "w3", "rejected": "w3"}, "the same"),
        ({"prompt": PROMPT, "chosen": said(" "), "rejected": said("w3")}, "empty"),
        ({"prompt": PROMPT, "chosen": said("w3"), "rejected": []}, "no assistant turn"),
        ({"prompt": "w1", "chosen": "w3", "rejected": ""}, "empty"),
        ({"prompt": [], "chosen": [*PROMPT, *said("w3")], "rejected": said("w4")}, "do not start with a common"),
    ],
)
def test_faults_are_counted_by_cause(row: dict[str, Any], cause: str, words: ChatTokenizer) -> None:
    with pytest.raises(RowFault, match=cause):
        make().encode(row, words)


def test_truncation_keeps_a_pair_together_or_refuses_it(words: ChatTokenizer) -> None:
    row = {"prompt": "w1 ", "chosen": "w2 w3", "rejected": "w4 w5"}
    cut = make(max_length=2).truncate(row, words)
    assert [len(one["input_ids"]) for one in cut] == [2, 2]
    with pytest.raises(RowFault, match=r"do not differ within the first task\.max_length tokens"):
        make(max_length=2).truncate({"prompt": "w1 ", "chosen": "w2 w3", "rejected": "w2 w5"}, words)
    with pytest.raises(RowFault, match="do not differ within the first"):
        make(max_length=2).truncate({"prompt": "w1 w6 ", "chosen": "w2", "rejected": "w3"}, words)


def make_samples(count: int = 5) -> list[Sample]:
    dice = np.random.default_rng(1)
    samples = []
    for index in range(count):
        prompt = dice.integers(1, 40, size=dice.integers(1, 6))
        parts = []
        for _ in range(2):
            answer = dice.integers(1, 40, size=dice.integers(1, 7))
            labels = np.concatenate([np.full(len(prompt), -100), answer])
            values = {"input_ids": np.concatenate([prompt, answer]), "labels": labels}
            parts.append({**values, REFERENCE: np.array([-float(dice.uniform(5, 25))])})
        samples.append(Sample(parts, index))
    return samples


def make_causal() -> LlamaForCausalLM:
    return tiny.build("llama", initializer_range=0.3)


def plain(model: LlamaForCausalLM, samples: list[Sample]) -> torch.Tensor:
    """Log-probabilities by transformers, one sequence at a time, `[pairs, 2]`."""
    rows = []
    for sample in samples:
        row = []
        for part in sample.segments:
            ids, labels = torch.tensor(part["input_ids"]), torch.tensor(part["labels"])[1:]
            found = log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), dim=-1)
            keep = labels != -100
            row.append(found[keep].gather(1, labels[keep, None]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def references(samples: list[Sample]) -> torch.Tensor:
    return torch.tensor([[part[REFERENCE][0] for part in sample.segments] for sample in samples])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_are_those_of_plain_torch(smoothing: float) -> None:
    """DPO is a logistic loss of the margin, and cDPO is the same with a soft label."""
    samples, model = make_samples(), make_causal()
    task = make(padding_free=False, label_smoothing=smoothing, beta=0.3)
    own = task.loss(model, task.collate(samples))
    own.loss.backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    ratios = plain(model, samples) - references(samples)
    margins = 0.3 * (ratios[:, 0] - ratios[:, 1])
    soft = torch.full_like(margins, 1 - smoothing)
    expected = binary_cross_entropy_with_logits(margins, soft, reduction="sum")
    expected.backward()
    assert own.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float(own.weight) == len(samples)
    for one, parameter in zip(gradient, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keys", [{"loss_type": "hinge"}, {"loss_type": "ipo"}, {"loss_type": "robust"}, {}])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_is_that_of_trl(keys: dict[str, Any], beta: float, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    samples, model = make_samples(), make_causal()
    if keys.get("loss_type") == "robust":
        keys = {**keys, "label_smoothing": 0.2}
    task = make(padding_free=False, beta=beta, **keys)
    own = task.score(model, task.collate(samples))
    trainer = trl.DPOTrainer(
        model,
        ref_model=make_causal(),  # not used: the batch has the reference log-probabilities
        args=trl.DPOConfig(tmp_path, beta=beta, report_to="none", use_cpu=True, bf16=False, **keys),
        train_dataset=trl_rows(samples),
        processing_class=PreTrainedTokenizerFast.from_pretrained(save_model("llama", tmp_path / "words")),
    )
    batch = trl_batch(samples)
    trainer.precompute_ref_logps = True
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    assert float(own.loss / own.weight) == pytest.approx(float(loss), rel=1e-5)
    told = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    mine = task.metrics(own, [])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert mine[name] == pytest.approx(float(told[name]), rel=1e-4, abs=1e-6), name
    for name in ("logps/chosen", "logps/rejected"):
        assert mine[name] == pytest.approx(float(told[name]), rel=1e-5), name


def trl_rows(samples: list[Sample]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"} for _ in samples])


def trl_batch(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Batch as collated by TRL: all chosen rows, then all rejected rows, right-padded."""
    parts = [sample.segments[side] for side in (0, 1) for sample in samples]
    longest = max(len(part["input_ids"]) for part in parts)
    ids, mask, answers = (torch.zeros(len(parts), longest, dtype=torch.int64) for _ in range(3))
    for i, part in enumerate(parts):
        length = len(part["input_ids"])
        ids[i, :length] = torch.from_numpy(part["input_ids"])
        mask[i, :length] = 1
        answers[i, :length] = torch.from_numpy((part["labels"] != -100).astype(int))
    known = references(samples).float()
    names = {"ref_chosen_logps": known[:, 0], "ref_rejected_logps": known[:, 1]}
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answers, **names}


def test_before_the_first_step_the_model_is_its_reference() -> None:
    samples, model = make_samples(), make_causal()
    task = make(padding_free=False)
    assert isinstance(task, Refers)
    with torch.no_grad():
        found = task.refer(model, task.collate(samples))
        values = [prediction["values"] for prediction in found.predictions]
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), plain(model, samples), rtol=1e-5, atol=1e-5
        )
        known = [
            Sample([{**part, REFERENCE: np.array([v])} for part, v in zip(sample.segments, row, strict=True)], i)
            for i, (sample, row) in enumerate(zip(samples, values, strict=True))
        ]
        start = task.score(model, task.collate(known))
    metrics = task.metrics(start, [])
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0
    assert json.loads(json.dumps(start.predictions[2])) == {"sample": 2, "reward_chosen": 0.0, "reward_rejected": 0.0}


def test_a_rank_without_samples_joins_with_nothing() -> None:
    task, model = make(padding_free=False), make_causal()
    batch: Batch = task.collate(make_samples()[:1]).without_targets()
    assert batch.loss_weight == 0
    for score in (task.loss, task.score, task.refer):
        result = score(model, batch)
        assert float(result.loss) == 0 and not result.predictions
    task.loss(model, batch).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
