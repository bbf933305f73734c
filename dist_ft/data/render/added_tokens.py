"""Tokens of the user's own domain or template (`model.add_tokens`), added to a tokenizer as special ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import Problem, RequestError

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
