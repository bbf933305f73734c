"""Reward modeling: the loss against TRL and plain PyTorch, with decoders and encoders."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dist_ft.config.task import RewardConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.state import Facts, Sample
from dist_ft.task.reward import Reward
from dist_ft.testing.words import save_model

ROWS = [
    {"prompt": "w1 w2 ", "chosen": "w3 w4 w5", "rejected": "w6"},
    {"prompt": "w7 ", "chosen": "w8", "rejected": "w9 w1 w2 w3"},
    {"prompt": "w4 w5 w6 ", "chosen": "w1 w1", "rejected": "w2 w2"},
]


def make(shape: str, folder: Any, **keys: Any) -> tuple[Reward, ChatTokenizer, Any]:
    path = save_model(shape, folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    facts = Facts(pad_id=0, has_token_types="token_type_ids" in tokenizer.model_input_names)
    config = RewardConfig(name="reward", **keys)
    architecture = Reward.architecture(config, facts)
    assert architecture.new_head
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(path, **architecture.overrides)
    for parameter in model.parameters():  # scores hardly differ with the original initialization
        parameter.data *= 5 if parameter.ndim > 1 else 1
    return Reward(config, facts), ChatTokenizer(tokenizer), model.eval()


def samples_of(task: Reward, words: ChatTokenizer) -> list[Sample]:
    encoded = [task.encode(row, words) for row in ROWS]
    return [
        Sample([{k: np.array(v) for k, v in part.items()} for part in pair], index)
        for index, pair in enumerate(encoded)
    ]


@pytest.mark.parametrize("shape", ["gpt2", "llama", "bert", "roberta"])
@pytest.mark.parametrize("center", [0.0, 0.1])
def test_loss_is_that_of_plain_torch(shape: str, center: float, tmp_path: Any) -> None:
    """The expected loss runs one sequence at a time and computes the formula of `RewardTrainer.compute_loss` of TRL."""
    task, words, model = make(shape, tmp_path, center_rewards_coefficient=center)
    samples = samples_of(task, words)
    with torch.no_grad():
        own = task.score(model, task.collate(samples))
        scores = []
        for sample in samples:
            for part in sample.segments:
                inputs = {name: torch.tensor(values)[None] for name, values in part.items()}
                scores.append(model(**inputs).logits[0, 0])
    chosen, rejected = torch.stack(scores).view(-1, 2).unbind(1)
    expected = -logsigmoid(chosen - rejected).mean() + center * ((chosen + rejected) ** 2).mean()
    metrics = task.metrics(own, [])
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert metrics["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert metrics["mean_reward"] == pytest.approx(float((chosen + rejected).mean() / 2), rel=1e-4)
    assert [set(row) for row in own.predictions] == [{"sample", "reward_chosen", "reward_rejected"}] * 3


def test_encoders_get_a_pair_of_texts_and_decoders_one(tmp_path: Any) -> None:
    task, words, _ = make("bert", tmp_path / "bert", max_length=6)
    chosen, rejected = task.encode(ROWS[0], words)
    assert chosen == {
        "input_ids": words.tokenizer("w1 w2", "w3 w4 w5")["input_ids"],
        "token_type_ids": [0, 0, 0, 0, 1, 1, 1, 1],
    }
    assert rejected["input_ids"] == words.tokenizer("w1 w2", "w6")["input_ids"]
    cut = task.truncate(ROWS[0], words)
    assert max(len(part["input_ids"]) for part in cut) == 6
    task, words, _ = make("gpt2", tmp_path / "gpt2")
    chosen, _ = task.encode(ROWS[0], words)
    assert chosen == {"input_ids": words.encode_pair("w1 w2 ", "w3 w4 w5")["input_ids"]}


@pytest.mark.parametrize("shape", ["bert", "gpt2"])
@pytest.mark.parametrize("answers", [("w1", "w1"), ("", "w1"), ("w1", " ")])
def test_empty_and_equal_answers_are_faults(shape: str, answers: tuple[str, str], tmp_path: Any) -> None:
    task, words, _ = make(shape, tmp_path)
    with pytest.raises(RowFault, match=r"same|empty"):
        task.encode({"prompt": "w5", "chosen": answers[0], "rejected": answers[1]}, words)


def test_a_rank_without_samples_joins_with_nothing(tmp_path: Any) -> None:
    task, words, model = make("gpt2", tmp_path)
    batch = task.collate(samples_of(task, words)).without_targets()
    result = task.loss(model, batch)
    assert batch.loss_weight == float(result.loss) == 0
    result.loss.backward()
    assert asdict(batch)["samples"] == ()


def test_trl_names_the_same_loss(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    task, words, model = make("llama", tmp_path / "m", center_rewards_coefficient=0.05)
    samples = samples_of(task, words)
    arguments = trl.RewardConfig(
        tmp_path / "out", center_rewards_coefficient=0.05, report_to="none", use_cpu=True, bf16=False
    )
    words.tokenizer.pad_token = "[PAD]"
    rows = Dataset.from_list([{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"]} for row in ROWS])
    trainer = trl.RewardTrainer(model, args=arguments, train_dataset=rows, processing_class=words.tokenizer)
    parts = [sample.segments[side]["input_ids"] for side in (0, 1) for sample in samples]
    longest = max(map(len, parts))
    ids = torch.tensor([[*part.tolist(), *[0] * (longest - len(part))] for part in parts])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, {"input_ids": ids, "attention_mask": (ids != 0).long()})
        own = task.loss(model, task.collate(samples))
    assert float(own.loss / own.weight) == pytest.approx(float(expected), rel=1e-5)
