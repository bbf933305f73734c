"""Words of the command line as text: sources in place of choices (`model=FOLDER`), and words that replace others."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data.read.folders import ENDINGS, ending_of
from ...data.read.remote import is_url
from ...storage.files import PACKAGE

QUOTES = "'\""


def expand(word: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Split `model=VALUE` and `data=VALUE` into a choice and a key if the value is a source and not a choice.

    Args:
        word: Argument of the command line.
        groups: Choices of every group.

    Returns:
        Two words, such as `model=hub` and `model.name_or_path=VALUE`, or the word itself.
    """
    key, _, text = word.partition("=")
    value = text.strip(QUOTES)
    if key not in ("model", "data") or value in groups.get(key, ()):
        return [word]
    if key == "model":
        is_model = value.startswith(PACKAGE) or "/" in value or _exists(value)
        return ["model=hub", f"model.name_or_path={text}"] if is_model else [word]
    is_file = is_url(value) or ending_of(Path(value)) in ENDINGS or glob.has_magic(value) or _exists(value)
    if is_file or value.startswith(PACKAGE) or "/" in value:
        return ["data=jsonl" if is_file else "data=hub", f"data.train={text}"]
    return [word]


def override_words(words: Sequence[str], later: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return `words` and `later`, without the words whose group or key `later` sets."""
    former, latter = ([part for word in given for part in expand(word, groups)] for given in (words, later))
    replaced = {word.partition("=")[0] for word in latter}
    return [*(word for word in former if word.partition("=")[0] not in replaced), *latter]


def _exists(value: str) -> bool:
    return bool(value) and Path(value).expanduser().exists()
