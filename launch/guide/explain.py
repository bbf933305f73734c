"""The commands that explain: `init`, `list`, `help`, `schema` and `completion`."""

from __future__ import annotations

import argparse


def init(options: argparse.Namespace) -> int:
    """Write a first configuration file."""
    from .init import init

    return init(options.words)


def list_choices(options: argparse.Namespace) -> int:
    """List the choices of a group, or of all groups."""
    from .listing import list_lines

    print("\n".join(list_lines(options.group, options.config_dir)))
    return 0


def help_key(options: argparse.Namespace) -> int:
    """Explain a key, a section or a command."""
    if options.key in (None, *options.parsers):
        print(options.parsers[options.key or "help"].format_help(), end="")
        return 0
    from .listing import help_lines

    print("\n".join(help_lines(options.key)))
    return 0


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON Schema of a configuration file."""
    import json

    from ..composition.compose import list_groups
    from ..composition.schema import file_schema

    print(json.dumps(file_schema(list_groups()), indent=2))
    return 0


def completion(options: argparse.Namespace) -> int:
    """Print the code that enables completion in a shell."""
    from .completion import shell_code

    print(shell_code(options.shell))
    return 0
