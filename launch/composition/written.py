"""Write a configuration as the YAML file that `file.py` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ...config.run import SECRETS, RunConfig
from . import keys
from .compose import default_values
from .file import DERIVED, LEFT_OUT, NAME, implied_choice


def write_config(config: RunConfig, origins: Mapping[str, str]) -> str:
    """Write a whole configuration: values that were set or differ from the defaults, and the others as comments.

    Read again, the file gives the same configuration. Values in comments stay defaults: batch sizes among them adapt to
    the number of workers.

    Args:
        config: Configuration with paths as the user gave them.
        origins: Origins of the keys that the user set.
    """
    tree = config.model_dump(mode="json")
    choices = {group: choice for group in tree if (choice := _choice(group, tree[group]))}
    defaults = default_values(choices)
    given = {key for key, origin in origins.items() if not origin.startswith(LEFT_OUT)}

    def is_written(key: str, value: Any) -> bool:
        if key in given or key == "run_name":
            return True
        return key not in (*DERIVED, "output_dir") and value != defaults.get(key, _schema_default(key, tree))

    lines = []
    for section, content in tree.items():
        if section not in keys.sections():
            lines += _entry(section, content, is_comment=not is_written(section, content))
            continue
        below = []
        for key, value in sorted(content.items(), key=lambda item: item[0] != NAME):
            if key in SECRETS.get(section, ()) and value is not None:
                below.append(f"# {key}: a secret, which is not shown")
            else:
                shown = key == NAME or is_written(f"{section}.{key}", value)
                below += _entry(key, value, is_comment=not shown)
        all_comments = all(line.startswith("#") for line in below)
        lines += ["", f"# {section}:" if all_comments else f"{section}:"]
        lines += [f"#   {line.removeprefix('# ')}" if all_comments else f"  {line}" for line in below]
    return "\n".join(lines) + "\n"


def _choice(group: str, content: Any) -> str | None:
    """Return the choice that a section of the file stands for; None if it is that of the defaults."""
    if not isinstance(content, dict):
        return None
    return content.get(NAME) or implied_choice(group, content)


def _schema_default(key: str, tree: Mapping[str, Any]) -> Any:
    section, _, rest = key.partition(".")
    record = keys.chosen(tree)[section]
    default = record.model_fields[rest].get_default(call_default_factory=True) if record and rest else None
    return list(default) if isinstance(default, tuple) else default


def _entry(key: str, value: Any, *, is_comment: bool) -> list[str]:
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 120}
    text = yaml.safe_dump({key: value}, default_flow_style=None if isinstance(value, list) else False, **options)
    return [f"# {line}" if is_comment else line for line in text.splitlines()]
