"""The chat template that a configuration names, as text; no tokenizer is needed to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...config.run import RunConfig
from ...errors import RequestError
from .added_tokens import add_tokens
from .template_file import read_template


def check_tokenizers(config: RunConfig, model_dir: str, tokenizer_dir: str) -> None:
    """A tokenizer given beside the model's own may add tokens, but must agree on those that both have."""
    own, given = (_vocabulary(Path(folder)) for folder in (model_dir, tokenizer_dir))
    if model_dir == tokenizer_dir or not own or not given:
        return
    same = sum(given.get(token) == number for token, number in own.items())
    if same < 0.9 * len(own):
        rule = f"{tokenizer_dir} has the same id for only {same} of the {len(own)} tokens of the model's own tokenizer"
        raise RequestError.of("model.tokenizer", rule, "leave model.tokenizer out, or name the one it was trained with")


def _vocabulary(folder: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError):
        return {}
    if isinstance(vocabulary, list):  # unigram models list (token, score)
        return {token: number for number, (token, *_) in enumerate(vocabulary)}
    return dict(vocabulary)


def open_tokenizer(config: RunConfig, folder: str) -> Any:
    """The tokenizer with the task's chat template; None where the data are tokens and there is no tokenizer."""
    try:
        return load_tokenizer(config, folder)
    except RequestError:
        if not config.data.only_tokens:
            raise
        return None


def load_tokenizer(config: RunConfig, folder: str) -> Any:
    """The tokenizer in `folder`, with the configured chat template where there is one, and the configured tokens.

    Raises:
        RequestError: there is none that transformers reads, or it has a token already that is to be added.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "set model.tokenizer to a folder or hub id that has one"
        raise RequestError.of("model.tokenizer", f"{folder} gives no tokenizer ({reason})", way_out) from error
    tokenizer.chat_template = read_template(config.task) or tokenizer.chat_template
    add_tokens(tokenizer, config.model.add_tokens)
    return tokenizer
