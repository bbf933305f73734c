"""LoRA initializations that move a part of the frozen weight into the adapter: PiSSA and OLoRA, by peft's formulas.

W becomes W - s·B0·A0 and the adapter is initialized to B0·A0, so that the initial model equals the base model. B0 and
A0 are stored in a file of the run, so that a resumed run subtracts the same product from W even if the factorization
differs on its machine. The export is an adapter of twice the rank for the unchanged base model:
s·(B·A - B0·A0) = s·[B, -B0]·[A; A0].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import peft
import torch
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.method import LoraKeys
from ..config.plan import START_FILE
from ..errors import Problem, RequestError
from ..model.quantization.packed import find_packed
from ..state import Beat, Weights, unwatched

ADAPTER = "default"
Start = dict[str, Tensor]  # A and B, float32, by parameter name


def begin(
    model: peft.PeftModel,
    kind: str,
    dtype: torch.dtype,
    start: Mapping[str, Tensor] | None = None,
    tick: Beat = unwatched,
) -> Start:
    """Initialize the adapters and subtract their part from the base weights.

    Args:
        model: Model with weights and with adapters of their final shapes.
        kind: `pissa`, `pissa_niter_N` (Meng et al. 2024, arXiv 2404.02948) or `olora` (Büyükakyüz 2024, arXiv
            2406.01775).
        dtype: Dtype of the forward, to which the factors are rounded, as some engines round all weights.
        start: The factors of a resumed run; computed if None.
        tick: Called for each layer: a factorization takes long.

    Returns:
        The initial factors.

    Raises:
        RequestError: `start` belongs to other adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lora.Linear)}
    names = {f"{name}.lora_{part}.{ADAPTER}.weight" for name in layers for part in "AB"}
    if start is not None and set(start) != names:
        rule = f"holds the initial factors of other adapters ({len(names ^ set(start))} names differ)"
        raise RequestError.of(START_FILE, rule, "resume with the method that the run started with")
    begun: Start = {}
    for name, layer in layers.items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        weight = layer.get_base_layer().weight
        whole = weight.data.clone()  # peft modifies it
        names_of = {part: f"{name}.lora_{part}.{ADAPTER}.weight" for part in "AB"}
        if start is None:
            layer.olora_init(ADAPTER) if kind == "olora" else layer.pissa_init(ADAPTER, kind)
        else:
            a.data, b.data = start[names_of["A"]].clone(), start[names_of["B"]].clone()
        for factor in (a, b):
            factor.data = factor.data.to(dtype).float().contiguous()
        part = layer.scaling[ADAPTER] * b.data @ a.data
        weight.data = (whole.float() - (part.T if layer.fan_in_fan_out else part)).to(whole.dtype)
        begun |= {names_of["A"]: a.data.clone(), names_of["B"]: b.data.clone()}
        tick(f"initial adapter of {name}")
    return begun


def start_problems(config: LoraKeys, model: peft.PeftModel) -> Iterator[Problem]:
    """Yield the reasons why this model cannot be initialized in this way."""
    key, kind = "method.init_lora_weights", config.init_lora_weights
    packed = find_packed(model)
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        base = layer.get_base_layer()
        plain = isinstance(layer, lora.Linear) and not isinstance(layer, lora.ParamWrapper)
        short = name.removeprefix("base_model.model.")
        if any(entry == name or entry.startswith(f"{name}.") for entry in packed):
            rule = f"{kind} changes the base weights, but {short} is quantized"
            yield Problem(key, rule, "set model.quantization=none, or remove it")
        elif not plain or (kind == "olora" and not isinstance(base, nn.Linear)):
            rule = f"{kind} factorizes linear layers, but {short} is {type(base).__name__}"
            yield Problem(key, rule, "remove it from method.target_modules and target_parameters, or remove this key")
        elif uses[id(base.weight)] > 1:
            rule = f"{kind} changes {short}, whose weight is shared with another module"
            yield Problem(key, rule, "remove it from method.target_modules")
        elif layer.r[ADAPTER] > min(base.weight.shape):
            rule = f"rank {layer.r[ADAPTER]} is larger than the dimensions of {short}, {tuple(base.weight.shape)}"
            yield Problem(key, rule, "lower method.r or method.rank_pattern")


def subtract(weights: Weights, start: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield trained A `[r, in]` and B `[out, r]` as [A; A0] and [B, -B0], and other tensors unchanged."""
    for name, tensor in weights:
        if name not in start:
            yield name, tensor
        elif f".lora_A.{ADAPTER}." in name:
            yield name, torch.cat([tensor, start[name].to(tensor)], dim=0)
        else:
            yield name, torch.cat([tensor, -start[name].to(tensor)], dim=1)


def double_rank(config: peft.LoraConfig) -> None:
    """Change the settings to an adapter of twice the rank with the same scale and the default initialization."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()}
    config.alpha_pattern = {pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True


def write_start(path: Path, start: Start) -> None:
    """Write the initial factors atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    save_file(start, staging)
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    staging.replace(path)


def read_start(path: Path) -> Start:
    """Read the initial factors of a run.

    Raises:
        RequestError: The file does not exist.
    """
    if not path.exists():
        rule = "does not exist, but it holds what the adapter subtracted from the base weights at initialization"
        raise RequestError.of(str(path), rule, "restore the file in the run's folder")
    return load_file(path)
