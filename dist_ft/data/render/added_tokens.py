"""Tokens of the user's own domain or template (`model.add_tokens`), added to a tokenizer as special ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.run import RunConfig
from ...errors import Problem, RequestError
from ...pretrained.folder import vocabulary_size
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class NewTokens:
    """The tokens of `model.add_tokens`; see the fields of these names in state.Facts."""

    new_tokens: tuple[str, ...] = ()
    new_token_ids: tuple[int, ...] = ()
    resized_vocabulary: int = 0


def find_new_tokens(config: RunConfig, model_dir: str, tokenizer_dir: str) -> NewTokens:
    """What `model.add_tokens` comes to for this model and tokenizer.

    Raises:
        RequestError: the tokenizer has one already, or more tokens than the model even without them.
    """
    if not config.model.add_tokens:
        return NewTokens()
    ids = tuple(load_tokenizer(config, tokenizer_dir).convert_tokens_to_ids(config.model.add_tokens))
    size = vocabulary_size(Path(model_dir))
    if size is None:
        rule = "config.json does not tell how many embeddings the model has"
        raise RequestError.of("model.add_tokens", rule, "leave it out, or name another model")
    if min(ids) > size:
        rule = f"the tokenizer has {min(ids)} tokens without them, and the model {size} embeddings"
        raise RequestError.of("model.add_tokens", rule, "use the model's own tokenizer (model.tokenizer)")
    return NewTokens(tuple(config.model.add_tokens), ids, max(ids) + 1 if max(ids) >= size else 0)


KEY = "model.add_tokens"


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Have a tokenizer of transformers read each of `tokens` as one token; gives their ids.

    They are special: found wherever they stand in a text, and left out where text is decoded without such tokens.

    Raises:
        RequestError: the tokenizer has some already, so no row would be new.
    """
    if not tokens:
        return ()
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    if old := [token for token in tokens if token in known]:
        rule, way_out = "the tokenizer has it already", "leave it out: it has an embedding"
        raise RequestError(*(Problem(KEY, f"{token!r}: {rule}", way_out) for token in old))
    new = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
