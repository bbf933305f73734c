"""User-defined tokens (`model.add_tokens`), added to a tokenizer as special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import Problem, RequestError

KEY = "model.add_tokens"


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add `tokens` to a transformers tokenizer as special tokens and return their ids.

    Special tokens are matched anywhere in a text, and skipped by decoding with `skip_special_tokens=True`.

    Raises:
        RequestError: The tokenizer already has one of the tokens, so its embedding would not be new.
    """
    if not tokens:
        return ()
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    if old := [token for token in tokens if token in known]:
        rule, way_out = "the tokenizer already has this token", "remove it from model.add_tokens"
        raise RequestError(*(Problem(KEY, f"{token!r}: {rule}", way_out) for token in old))
    new = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
