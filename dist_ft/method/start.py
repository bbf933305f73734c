"""Starts of LoRA that move a part of the frozen weight into the adapter: PiSSA and OLoRA, by peft's formulas.

W becomes W - s·B0·A0, and the adapter begins at B0·A0, so that the model is the base at first. B0 and A0 are kept in a
file of the run: a resumed run takes the same part out of W, whatever its machine would make of the factorisation, and
the export is an adapter of twice the rank for the base as it was, s·(B·A - B0·A0) = s·[B, -B0]·[A; A0].
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
from ..state import Weights

ADAPTER = "default"
Start = dict[str, Tensor]  # A and B, float32, by the names that the parameters have in the model


def begin(model: peft.PeftModel, kind: str, dtype: torch.dtype, start: Mapping[str, Tensor] | None = None) -> Start:
    """Have the adapters take their part out of the weights, and give what they begin with.

    Args:
        model: with its weights, and adapters of the shapes that are meant.
        kind: `pissa`, `pissa_niter_N` (Meng et al. 2024, arXiv 2404.02948) or `olora` (Büyükakyüz 2024, arXiv
            2406.01775).
        dtype: of the forward; the start is rounded to it, as some engines do with all weights.
        start: to begin with, and to compute none; of a run that goes on.

    Raises:
        RequestError: `start` is of other adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lora.Linear)}
    names = {f"{name}.lora_{part}.{ADAPTER}.weight" for name in layers for part in "AB"}
    if start is not None and set(start) != names:
        rule = f"holds the start of other adapters ({len(names ^ set(start))} names differ)"
        raise RequestError.of(START_FILE, rule, "go on with the method that the run began with")
    begun: Start = {}
    for name, layer in layers.items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        weight = layer.get_base_layer().weight
        whole = weight.data.clone()  # peft writes into it
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
    return begun


def start_problems(config: LoraKeys, model: peft.PeftModel) -> Iterator[Problem]:
    """Why the start cannot be made in this model."""
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
            rule = f"{kind} changes the base, and {short} is packed: what it leaves would have to be packed anew"
            yield Problem(key, rule, "set model.quantization=none, or remove it")
        elif not plain or (kind == "olora" and not isinstance(base, nn.Linear)):
            rule = f"{kind} factorises linear layers, and {short} is {type(base).__name__}"
            yield Problem(key, rule, "leave it out of method.target_modules and target_parameters, or remove the key")
        elif uses[id(base.weight)] > 1:
            rule = f"{kind} changes {short}, whose weight is another module's too"
            yield Problem(key, rule, "leave it out of method.target_modules")
        elif layer.r[ADAPTER] > min(base.weight.shape):
            rule = f"{kind} has no {layer.r[ADAPTER]} directions to take out of {short} {tuple(base.weight.shape)}"
            yield Problem(key, rule, "lower method.r or its rank_pattern")


def subtract(weights: Weights, start: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Trained A [r, in] and B [out, r] as [A; A0] and [B, -B0], for the base as it was; what else comes, as it is."""
    for name, tensor in weights:
        if name not in start:
            yield name, tensor
        elif f".lora_A.{ADAPTER}." in name:
            yield name, torch.cat([tensor, start[name].to(tensor)], dim=0)
        else:
            yield name, torch.cat([tensor, -start[name].to(tensor)], dim=1)


def double_rank(config: peft.LoraConfig) -> None:
    """Settings of an adapter of twice the rank and the same scale, which begins where the base is."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()}
    config.alpha_pattern = {pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True


def write_start(path: Path, start: Start) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    save_file(start, staging)
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    staging.replace(path)


def read_start(path: Path) -> Start:
    """What a run began with.

    Raises:
        RequestError: the file is not there.
    """
    if not path.exists():
        rule = "is missing, and without it nobody knows what the adapter took out of the base at its start"
        raise RequestError.of(str(path), rule, "bring it back to where it was, beside the run's checkpoints")
    return load_file(path)
