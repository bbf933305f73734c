"""Parts of a model that learn: the last blocks, patterns, embeddings, head, biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dist_ft.config.method import BitfitConfig, FreezeConfig
from dist_ft.errors import RequestError
from dist_ft.method.bitfit import Bitfit
from dist_ft.method.freeze import Freeze
from dist_ft.model.anatomy import find_anatomy

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64))


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def freeze(**settings: Any) -> Freeze:
    return Freeze(FreezeConfig(name="freeze", **settings))


@pytest.mark.parametrize(("build", "blocks"), [(llama, "model.layers."), (gpt2, "transformer.h.")])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_blocks_learn_whole(build: Any, blocks: str, layers: int) -> None:
    model = build()
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"{blocks}{i}.") for i in range(3 - layers, 3))
    }
    assert trained(freeze(num_layers=layers).apply(find_anatomy(model))) == expected


def test_no_layers_and_the_head_is_feature_extraction() -> None:
    assert trained(freeze(num_layers=0, train_head=True).apply(find_anatomy(llama()))) == {"lm_head.weight"}


def test_embeddings_and_patterns_add_up() -> None:
    names = trained(
        freeze(num_layers=0, train_embeddings=True, trainable=[r"layers\.0\..*norm", "q_proj"]).apply(
            find_anatomy(llama())
        )
    )
    assert names == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)),
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_layers": 0}, "nothing would be trained"),
        ({"num_layers": 4}, "the model has 3"),
        ({"trainable": ["q_prjo"]}, "matches no parameter name"),
        ({"trainable": ["q_(proj"]}, "not a regular expression"),
    ],
)
def test_what_cannot_be_is_an_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        freeze(**settings).apply(find_anatomy(llama()))


@pytest.mark.parametrize("settings", [{"train_head": True}, {"train_embeddings": True}])
def test_tied_embeddings_learn_together_or_not_at_all(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="are tied"):
        freeze(num_layers=0, **settings).apply(find_anatomy(llama(tie_word_embeddings=True)))
    both = freeze(num_layers=0, train_head=True, train_embeddings=True).apply(
        find_anatomy(llama(tie_word_embeddings=True))
    )
    assert trained(both) == {"model.embed_tokens.weight"}


def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    model = gpt2()
    names = trained(Bitfit(BitfitConfig(name="bitfit")).apply(find_anatomy(model)))
    # c_attn, attn.c_proj, c_fc, mlp.c_proj, ln_1, ln_2 of each block, and ln_f
    assert len(names) == 3 * 6 + 1 and all(name.endswith(".bias") for name in names)
    assert {name for name, _ in model.named_parameters() if name.endswith("bias")} == names


def test_bitfit_of_a_model_without_biases_is_an_error() -> None:
    with pytest.raises(RequestError, match="LlamaForCausalLM has no biases") as caught:
        Bitfit(BitfitConfig(name="bitfit")).apply(find_anatomy(llama()))
    assert "ln_tuning" in str(caught.value)
