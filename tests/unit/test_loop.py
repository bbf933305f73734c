"""Seeds of a step, and ticks of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dist_ft.config.task import Seq2SeqConfig
from dist_ft.loop import step_seed, tick_calls
from dist_ft.model.anatomy import find_anatomy
from dist_ft.state import Facts, Sample
from dist_ft.task.seq2seq import Seq2Seq
from dist_ft.testing import tiny
from tests.samples import lora


@pytest.mark.parametrize("seed", [0, 7, 2026112401, 2**63, 2**64 - 1])
def test_every_seed_of_the_configuration_is_one_that_torch_takes(seed: int) -> None:
    torch.manual_seed(seed)
    torch.manual_seed(step_seed(seed, 10**6, 511))


def test_steps_and_ranks_draw_differently_and_repeatably() -> None:
    drawn = {}
    for seed, step, rank in [(s, n, r) for s in (1, 2026112401) for n in (1, 2) for r in (0, 1)]:
        torch.manual_seed(step_seed(seed, step, rank))
        drawn[seed, step, rank] = tuple(torch.rand(4).tolist())
        torch.manual_seed(step_seed(seed, step, rank))
        assert tuple(torch.rand(4).tolist()) == drawn[seed, step, rank]
    assert len(set(drawn.values())) == len(drawn)


class Letters:
    """A tokenizer that decodes anything."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "x"

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return ["x" for _ in rows]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_each_token_of_a_generated_text_ticks(method: str, wrapped: bool) -> None:
    model: Any = tiny.build("t5", vocab_size=20, eos_token_id=None, decoder_start_token_id=3).eval()
    if method == "lora":
        model = lora(r=2).apply(find_anatomy(model)).eval()
    task = Seq2Seq(
        Seq2SeqConfig(name="seq2seq", metrics=["rouge"], max_new_tokens=9), Facts(pad_id=0, decoder_start_id=3)
    )
    task.__dict__["tokenizer"] = Letters()
    batch = task.collate([Sample([{"input_ids": np.array([5, 6, 1])}, {"input_ids": np.array([7, 1])}], 0)])
    whole = torch.nn.Sequential() if wrapped else model
    if wrapped:  # as DDP and DeepSpeed do
        whole.module, whole.forward = model, model.forward
    ticks: list[str] = []
    with torch.no_grad():
        found = tick_calls(task.score, ticks.append)(whole, batch)
    assert len(found.predictions) == 1 and len(ticks) >= 9
    count = len(ticks)
    model(**batch.inputs)
    assert len(ticks) == count, "hooks are gone"
