"""The parts of a multimodal model that text does not reach: vision and audio towers, projectors, idle layers.

Found by one forward of text over fake tensors, which have shapes but no memory: a parameter is reached if autograd
would give it a gradient. Twins of the model are built from its configuration, so that the model itself is not touched
and every rank finds the same.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..state import Anatomy

TEXT = 8  # tokens of the traced row
DTYPE = torch.bfloat16  # of the traced weights: fake products of grouped experts know no other


def find_idle(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules, and of single parameters, that a text's output does not depend on.

    Only models whose configuration is made of several are looked at; empty for others. Where a class cannot be traced,
    the towers with a configuration of their own are returned, and a warning says so.
    """
    if not isinstance(model, PreTrainedModel) or not _parts_of(model.config):
        return []
    try:
        reached = _reached_by_text(_twin_of(model))
    except Exception as error:  # a class may fail in any way, such as one that demands an image
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{type(model).__name__}: no trace of a text ({reason}); towers are left out", stacklevel=2)
        return _find_towers(model)
    return list(_outermost(model, {name for name, _ in model.named_parameters()} - reached))


def lies_in(name: str, parts: Iterable[str]) -> bool:
    """Return whether a module or parameter is one of `parts` or inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def name_idle(anatomy: Anatomy) -> str:
    """Return the names of the idle parts, with `*` for the number of a layer, and their parameters in all."""
    named = anatomy.model.named_parameters()
    count = sum(parameter.numel() for name, parameter in named if lies_in(name, anatomy.idle))
    names = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in anatomy.idle)
    return f"{', '.join(names)} ({count:,} parameters)"


def _parts_of(config: Any) -> list[PreTrainedConfig]:
    """The configurations that a composite configuration consists of."""
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def _twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of the same class and configuration on the meta device, with attention that runs on fake tensors."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        return type(model)(config).eval()


def _reached_by_text(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that the output for a row of text depends on."""
    with torch.device("cpu"), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        weights = {n: torch.empty(p.shape, dtype=DTYPE).requires_grad_() for n, p in model.named_parameters()}
        buffers = {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers()}
        outputs = torch.func.functional_call(model, {**weights, **buffers}, kwargs=_row_of_text(model))
    leaves = leaves_of(outputs)
    return {name for name, weight in weights.items() if id(weight) in leaves}


def _row_of_text(model: PreTrainedModel) -> dict[str, Any]:
    """What the forward is called with: token ids and nothing else that it can do without."""
    ids = torch.zeros(1, TEXT, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def leaves_of(outputs: Any) -> set[int]:
    """Identities of the tensors that the graph behind `outputs` ends in."""
    open_nodes = [tensor.grad_fn for tensor in _tensors_in(outputs) if tensor.grad_fn is not None]
    seen: set[Any] = set()
    leaves = set()
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        open_nodes.extend(before for before, _ in node.next_functions if before is not None)
    return leaves


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry)


def _outermost(module: nn.Module, idle: set[str], prefix: str = "") -> Iterator[str]:
    """The modules all of whose parameters are in `idle`, and the parameters of it that stand beside reached ones."""
    names = [prefix + name for name, _ in module.named_parameters()]
    if prefix and names and idle.issuperset(names):
        yield prefix[:-1]
        return
    for name, _ in module.named_parameters(recurse=False):
        if prefix + name in idle:
            yield prefix + name
    for name, child in module.named_children():
        yield from _outermost(child, idle, f"{prefix}{name}.")


def _find_towers(model: PreTrainedModel) -> list[str]:
    """The outermost models inside the model whose configuration is a part of its own, except the one of text."""
    text = model.config.get_text_config()
    other = {id(part) for part in _parts_of(model.config) if part is not text and text not in _parts_of(part)}
    found: list[str] = []
    for name, module in model.named_modules():
        is_tower = isinstance(module, PreTrainedModel) and id(module.config) in other
        if is_tower and not lies_in(name, found):
            found.append(name)
    return found
