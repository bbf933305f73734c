"""Ids and vocabulary size that result from `model.add_tokens` for a given model and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...config.run import RunConfig
from ...errors import RequestError
from ...pretrained.folder import vocabulary_size
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class NewTokens:
    """The tokens of `model.add_tokens`; see the fields with the same names in `state.Facts`."""

    new_tokens: tuple[str, ...] = ()
    new_token_ids: tuple[int, ...] = ()
    resized_vocabulary: int = 0


def find_new_tokens(config: RunConfig, model_dir: str, tokenizer_dir: str) -> NewTokens:
    """Return the ids of `model.add_tokens` and the vocabulary size that they require.

    Raises:
        RequestError: The tokenizer already has one of the tokens, or it has more tokens than the model has embeddings
            even without them.
    """
    if not config.model.add_tokens:
        return NewTokens()
    ids = tuple(load_tokenizer(config, tokenizer_dir).convert_tokens_to_ids(config.model.add_tokens))
    size = vocabulary_size(Path(model_dir))
    if size is None:
        rule = "the model's config.json has no vocabulary size"
        raise RequestError.of("model.add_tokens", rule, "remove model.add_tokens, or use another model")
    if min(ids) > size:
        rule = f"the tokenizer has {min(ids)} tokens without them, but the model has only {size} embeddings"
        raise RequestError.of("model.add_tokens", rule, "set model.tokenizer to the model's own tokenizer")
    return NewTokens(tuple(config.model.add_tokens), ids, max(ids) + 1 if max(ids) >= size else 0)
