"""Methods by peft train what peft itself would, and virtual tokens stand where they should."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoTokenizer, LlamaForCausalLM

from dist_ft.config.method import MethodConfig
from dist_ft.errors import RequestError
from dist_ft.families import method_of
from dist_ft.model.anatomy import find_anatomy
from dist_ft.task.batches import tokens
from dist_ft.testing import tiny
from tests.samples import samples_of

llama, gpt2, bloom = (partial(tiny.build, name) for name in ("llama", "gpt2", "bloom"))


def method(name: str, **settings: Any) -> Any:
    return method_of(TypeAdapter(MethodConfig).validate_python({"name": name, **settings}))


def trained(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


CAUSAL = {"task_type": "CAUSAL_LM"}
NORMS = {llama: ["input_layernorm", "norm", "post_attention_layernorm"], gpt2: ["ln_1", "ln_2", "ln_f"]}
CASES = [
    ("ia3", {}, peft.IA3Config(**CAUSAL), llama),
    ("ia3", {}, peft.IA3Config(**CAUSAL), gpt2),
    ("ia3", {}, peft.IA3Config(**CAUSAL), bloom),
    ("ln_tuning", {}, peft.LNTuningConfig(**CAUSAL, target_modules=NORMS[llama]), llama),
    ("ln_tuning", {}, peft.LNTuningConfig(**CAUSAL, target_modules=NORMS[gpt2]), gpt2),
    ("prompt", {"num_virtual_tokens": 5}, peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=5), llama),
    ("prefix", {"num_virtual_tokens": 5}, peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=5), gpt2),
    (
        "prefix",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7},
        peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7),
        llama,
    ),
    ("p_tuning", {"num_virtual_tokens": 5}, peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=5), llama),
]


@pytest.mark.parametrize(("name", "settings", "config", "build"), CASES)
def test_trains_what_peft_does(name: str, settings: dict[str, Any], config: peft.PeftConfig, build: Any) -> None:
    base, other = build(), build()
    torch.manual_seed(3)
    model = method(name, **settings).apply(find_anatomy(base))
    torch.manual_seed(3)
    expected = peft.get_peft_model(other, config)
    assert trained(model) == trained(expected) and trained(model)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, expected.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["ia3", "ln_tuning"])
def test_targets_must_match(name: str) -> None:
    with pytest.raises(RequestError, match="kproj"):
        method(name, target_modules=["kproj"]).apply(find_anatomy(llama()))


def test_ia3_of_a_model_that_peft_does_not_know_asks_for_targets() -> None:
    model = llama()
    model.config.model_type = "unheard_of"
    with pytest.raises(RequestError, match="unheard_of") as caught:
        method("ia3").apply(find_anatomy(model))
    assert "k_proj" in str(caught.value)
    with pytest.raises(RequestError, match=r"not in method\.target_modules"):
        method("ia3", target_modules=["k_proj"], feedforward_modules=["down_proj"]).apply(find_anatomy(model))


def test_a_prompt_starts_from_a_text(tiny_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    text = "Be brief."
    learned = method("prompt", num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text=text).apply(
        find_anatomy(model)
    )
    ids = (AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"] * 4)[:4]
    assert torch.equal(learned.prompt_encoder["default"].embedding.weight, model.model.embed_tokens.weight[ids])


@pytest.mark.parametrize("name", ["prompt", "prefix", "p_tuning"])
def test_padding_and_virtual_tokens_do_not_move_the_loss(name: str) -> None:
    """Rows of a padded micro-batch give together what each gives alone, and what one computes by hand from logits."""
    torch.manual_seed(1)
    model = method(name, num_virtual_tokens=3).apply(find_anatomy(llama())).eval()
    rows = [np.arange(1, 12), np.arange(20, 25), np.arange(40, 48)]
    samples = samples_of([{"input_ids": ids, "labels": ids}] for ids in rows)
    together = tokens.sum_losses(model, tokens.collate_padded(samples))
    by_hand = 0.0
    for ids in rows:
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -len(ids) :]
        by_hand += float(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]), reduction="sum"))
    assert float(together.loss) == pytest.approx(by_hand, rel=1e-5)
    assert float(together.weight) == sum(len(ids) - 1 for ids in rows)
