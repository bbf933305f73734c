"""Parameters that are used without calling their module, such as `dt_proj` of Jamba's Mamba layers.

An adapter around such a module would not be computed, and a packed weight would not be unpacked. They are found in the
source code of the class of the parent module: it reads `self.NAME.weight` other than to learn its dtype or shape, also
if it does so on a GPU only.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

ASKING = {"isinstance", "hasattr"}
PROPERTIES = {"dtype", "device", "shape", "size", "ndim", "requires_grad", "is_meta"}


def is_used_directly(model: nn.Module, name: str, parameter: str = "weight") -> bool:
    """Return whether the parent of the module `name` computes with one of its parameters without calling it."""
    parent, _, attribute = name.rpartition(".")
    kind: Any = type(model.get_submodule(parent))
    return attribute in _read_of_children(kind, parameter)


@functools.cache
def _read_of_children(kind: type, parameter: str) -> frozenset[str]:
    """Return the attributes whose `parameter` the methods of a class read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # no source code
        return frozenset()
    harmless = set()
    for node in ast.walk(tree):
        # BLOOM can compute slice by slice, as its pretraining did
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in PROPERTIES):
            harmless.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            harmless |= {id(argument) for argument in node.args}
    return frozenset(
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == parameter
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
        and id(node) not in harmless
    )
