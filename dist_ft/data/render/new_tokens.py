"""What `model.add_tokens` comes to for a given model and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...config.run import RunConfig
from ...errors import RequestError
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
