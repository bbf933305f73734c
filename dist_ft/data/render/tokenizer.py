"""Loading of tokenizers with the configured chat template and added tokens, and the ids of these tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.run import RunConfig
from ...errors import Problem, RequestError
from ...pretrained.folder import vocabulary_size
from .template_file import read_template, with_defaults, with_own

ADDED = "model.add_tokens"


def check_tokenizers(config: RunConfig, model_dir: str, tokenizer_dir: str) -> None:
    """Check that a configured tokenizer agrees with the model's own tokenizer; it may have further tokens.

    Raises:
        RequestError: Fewer than 90 % of the tokens of the model's own tokenizer have the same id.
    """
    own, given = (_vocabulary(Path(folder)) for folder in (model_dir, tokenizer_dir))
    if model_dir == tokenizer_dir or not own or not given:
        return
    same = sum(given.get(token) == number for token, number in own.items())
    if same < 0.9 * len(own):
        rule = f"{tokenizer_dir} has the same id for only {same} of the {len(own)} tokens of the model's own tokenizer"
        raise RequestError.of(
            "model.tokenizer", rule, "remove model.tokenizer, or use the one the model was trained with"
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError):
        return {}
    if isinstance(vocabulary, list):  # unigram models store a list of (token, score)
        return {token: number for number, (token, *_) in enumerate(vocabulary)}
    return dict(vocabulary)


def open_tokenizer(config: RunConfig, folder: str) -> Any:
    """Return the tokenizer as `load_tokenizer` does, or None if there is none and all data is already tokenized.

    Raises:
        RequestError: The tokenizer cannot be loaded, and some of the data has to be tokenized.
    """
    try:
        return load_tokenizer(config, folder)
    except RequestError:
        if not config.data.only_tokens:
            raise
        return None


def load_tokenizer(config: RunConfig, folder: str) -> Any:
    """Load the tokenizer in `folder` with the configured chat template (if any) and added tokens.

    Raises:
        RequestError: transformers cannot load a tokenizer, or the tokenizer already has one of the added tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "set model.tokenizer to a folder or Hub id that has a tokenizer"
        raise RequestError.of("model.tokenizer", f"{folder} has no loadable tokenizer ({reason})", way_out) from error
    tokenizer.chat_template = with_defaults(
        with_own(read_template(config.task), tokenizer.chat_template),
        getattr(config.task, "chat_template_kwargs", {}),
    )
    add_tokens(tokenizer, config.model.add_tokens)
    return tokenizer


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
        raise RequestError(*(Problem(ADDED, f"{token!r}: {rule}", way_out) for token in old))
    new = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


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
