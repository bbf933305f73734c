"""Parts of a model that learn: the last blocks, patterns, embeddings, head."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.config.method import FreezeConfig
from dist_ft.errors import RequestError
from dist_ft.method.freeze import Freeze
from dist_ft.model.anatomy import find_anatomy
from dist_ft.testing import tiny
from tests.samples import trainable_names

LAYERS = 3


def llama(**changes: Any) -> Any:
    return tiny.build("llama", num_hidden_layers=LAYERS, **changes)


def gpt2() -> Any:
    return tiny.build("gpt2", n_layer=LAYERS)


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
    assert trainable_names(freeze(num_layers=layers).apply(find_anatomy(model))) == expected


def test_no_layers_and_the_head_is_feature_extraction() -> None:
    assert trainable_names(freeze(num_layers=0, train_head=True).apply(find_anatomy(llama()))) == {"lm_head.weight"}


def test_embeddings_and_patterns_add_up() -> None:
    names = trainable_names(
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
        ({"trainable": ["q_prjo"]}, "'q_prjo' matches no parameter"),
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
    assert trainable_names(both) == {"model.embed_tokens.weight"}
