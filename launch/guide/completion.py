"""Completion in a shell: the words that may follow, by argcomplete."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from ...errors import MachineError

SHELLS = ("bash", "zsh", "fish")


def shell_code(shell: str) -> str:
    """Return the code that enables completion in a shell.

    Raises:
        MachineError: If argcomplete is not installed.
    """
    try:
        import argcomplete
    except ImportError:
        raise MachineError.of("argcomplete", "is not installed", "run `pip install argcomplete`") from None
    return str(argcomplete.shellcode(["dist-ft"], shell=shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions that a shell asks for, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)


def complete_word(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterator[str]:
    """Yield the words of a command that begin with `prefix`; argcomplete calls this."""
    from ...process import options
    from ..composition import keys
    from ..composition.compose import list_groups

    kind = getattr(parsed_args, "own_words", None)
    own = getattr(options, kind).model_fields if kind else {}
    yield from _begin(prefix, (f"{name}=" for name in own))
    if not getattr(parsed_args, "takes_config", False):
        return
    groups = list_groups()
    group = prefix.partition("=")[0]
    if group in groups and "=" in prefix:
        yield from _begin(prefix, (f"{group}={choice}" for choice in groups[group]))
    else:
        yield from _begin(prefix, (f"{name}=" for name in [*groups, *keys.every_key()]))


def _begin(prefix: str, words: Iterable[str]) -> Iterator[str]:
    return (word for word in words if word.startswith(prefix))
