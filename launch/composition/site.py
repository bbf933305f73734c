"""Defaults of a site (`launch.site=FILE`): a YAML file with keys of the group `launch`, which the user's own replace.

partition: gpu
account: physics
setup: [module load cuda]
sbatch: {mail-type: FAIL}
"""

from __future__ import annotations

from pathlib import Path

import yaml

from ...errors import Problem
from . import keys
from .file import YamlLoader

KEY = "launch.site"


def apply_site(tree: keys.Tree, origins: dict[str, str]) -> list[Problem]:
    """Set the keys of the file that `launch.site` names, unless the user has set them.

    Args:
        tree: The composed configuration, which is changed.
        origins: Origins of the keys that the user set; those of the file are added.

    Returns:
        The problems of the file.
    """
    name = keys.get_value(tree, KEY)
    if name is None:
        return []
    path = Path(str(name)).expanduser().absolute()
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # noqa: S506 – a safe loader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [Problem(KEY, f"{path} cannot be read: {error}", "name a YAML file with keys of launch")]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return [Problem(KEY, f"{path} does not contain keys with values", "write lines such as `partition: gpu`")]
    problems = []
    known = [key for key in keys.valid_keys(tree) if key.startswith("launch.")]
    for key, value in content.items():
        dotted = f"launch.{key}"
        if dotted not in known or dotted in (KEY, "launch.name"):
            close = keys.nearest(dotted, known)
            way_out = f"did you mean {close}?" if close else f"valid keys: {', '.join(known)}"
            problems.append(Problem(f"{key} ({path})", "is unknown, or cannot be a default of a site", way_out))
        elif dotted not in origins:
            own = keys.get_value(tree, dotted)  # single options of `sbatch` that the user set
            keys.set_value(tree, dotted, {**value, **(own or {})} if isinstance(value, dict) else value)
            origins[dotted] = str(path)
    keys.set_value(tree, KEY, str(path))
    return problems
