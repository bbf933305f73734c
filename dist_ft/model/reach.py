"""The parts of a multimodal model that text does not reach: vision and audio towers, projectors, idle layers.

They are found by one forward of text over fake tensors, which have shapes but no memory: text reaches a parameter if
autograd would give it a gradient. The forward uses a twin that is built from the model's configuration, so that the
model itself is unchanged and every rank gets the same result.
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
DTYPE = torch.bfloat16  # of the traced weights: the fake kernel of grouped experts supports no other


def find_idle(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules, and of single parameters, that do not affect the output for text.

    Only models with a composite configuration are traced; the result is empty for others. If a class cannot be traced,
    the towers that have their own configuration are returned with a warning.
    """
    if not isinstance(model, PreTrainedModel) or not _parts_of(model.config):
        return []
    try:
        reached = _reached_by_text(_twin_of(model))
    except Exception as error:  # a class may fail in any way, for example because it requires an image
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{type(model).__name__}: no trace of a text ({reason}); towers are left out", stacklevel=2)
        return _find_towers(model)
    return list(_outermost(model, {name for name, _ in model.named_parameters()} - reached))


def lies_in(name: str, parts: Iterable[str]) -> bool:
    """Return whether a module or parameter is one of `parts` or inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def name_idle(anatomy: Anatomy) -> str:
    """Describe the idle parts: their names, with `*` for layer numbers, and their total number of parameters."""
    named = anatomy.model.named_parameters()
    count = sum(parameter.numel() for name, parameter in named if lies_in(name, anatomy.idle))
    names = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in anatomy.idle)
    return f"{', '.join(names)} ({count:,} parameters)"


def _parts_of(config: Any) -> list[PreTrainedConfig]:
    """Return the parts of a composite configuration."""
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def _twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Build the same modules on the meta device, with an attention implementation that runs on fake tensors."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        return type(model)(config).eval()


def _reached_by_text(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that the output for a row of text depends on."""
    with torch.device("cpu"), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        weights = {n: torch.empty(p.shape, dtype=DTYPE).requires_grad_() for n, p in model.named_parameters()}
        buffers = {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers()}
        outputs = torch.func.functional_call(model, {**weights, **buffers}, kwargs=row_of_text(model, (1, TEXT)))
    leaves = leaves_of(outputs)
    return {name for name, weight in weights.items() if id(weight) in leaves}


def row_of_text(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments of the forward: token ids of this shape, and other inputs only if they are required."""
    ids = torch.zeros(shape, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def leaves_of(outputs: Any) -> set[int]:
    """Return the `id` of each leaf tensor of the autograd graph of `outputs`."""
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
    """Yield the outermost modules whose parameters are all in `idle`, and single idle parameters of other modules."""
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
    """Return the names of the outermost inner models with their own configuration, except the text model."""
    text = model.config.get_text_config()
    other = {id(part) for part in _parts_of(model.config) if part is not text and text not in _parts_of(part)}
    found: list[str] = []
    for name, module in model.named_modules():
        is_tower = isinstance(module, PreTrainedModel) and id(module.config) in other
        if is_tower and not lies_in(name, found):
            found.append(name)
    return found
