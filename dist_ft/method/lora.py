"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft.

Every target must match a module. The head and routers are adapted only on request.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import peft
import torch
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.method import LoraKeys
from ..errors import Problem, RequestError
from ..model.direct import is_used_directly
from ..model.moe.adapted import merge_on_demand
from ..model.quantization.packed import find_packed
from ..state import Anatomy, Beat, Weights, unwatched
from .start import ADAPTER, Start, begin, double_rank, read_start, start_problems, subtract, write_start
from .through_peft import ThroughPeft, check_names, keep_to_text, task_type_of


class Lora(ThroughPeft):
    """The methods `lora` and `qlora`; DoRA and rsLoRA are settings.

    Args:
        config: Configuration of the method.
        start_file: File for the initial factors of PiSSA and OLoRA (see `start.py`); None keeps them in memory.
    """

    config: LoraKeys

    def __init__(self, config: LoraKeys, start_file: Path | None = None) -> None:
        self.config = config
        self.start_file = start_file
        self.start: Start | None = None

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and add adapters to the target modules.

        Raises:
            RequestError: A target, pattern, layer or module to save matches nothing, or cannot be combined with
                another setting.
        """
        config, model = self.config, anatomy.model
        targets = _resolve_targets(config.target_modules, anatomy)
        check_names("method.modules_to_save", config.modules_to_save, model, [])
        _check_parameters(config, model)
        _check_packed_copies(config, model)
        if problems := [*_layer_problems(config, len(anatomy.blocks), targets), *_exclusion_problems(config, model)]:
            raise RequestError(*problems)
        targets = keep_to_text("method.target_modules", targets, anatomy)
        if config.layers_to_transform is not None and isinstance(targets, list):
            targets = _within(config.layers_to_transform, targets)
        rows = anatomy.token_rows if anatomy.new_token_ids else ()
        if problems := list(_row_problems(config, rows)):
            raise RequestError(*problems)
        settings = _settings_of(config, anatomy, targets)
        _keep_from_experts(settings, model, all_linear=config.target_modules == "all-linear")
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:
            _explain_packed_experts(model, error)
            raise
        if problems := _pattern_problems(config, adapted.targeted_module_names):
            raise RequestError(*problems)
        if config.moves_base:
            if problems := list(start_problems(config, adapted)):
                raise RequestError(*problems)
            settings.init_lora_weights = config.init_lora_weights  # read by `export`
        merge_on_demand(adapted)
        return adapted

    def begin(self, model: nn.Module, dtype: torch.dtype, tick: Beat = unwatched) -> None:
        """Initialize the adapters with a part of the base weights if `init_lora_weights` is PiSSA or OLoRA.

        Called only on a rank that has the weights; engines distribute the result. A resumed run uses the stored
        factors.
        """
        if not self.config.moves_base:
            return
        assert isinstance(model, peft.PeftModel)
        known = read_start(self.start_file) if self.start_file and self.start_file.exists() else self.start
        start = begin(model, str(self.config.init_lora_weights), dtype, known, tick)
        if self.start_file is None:
            self.start = start
        elif known is None:
            write_start(self.start_file, start)

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write the adapter in peft's format; PiSSA and OLoRA are converted to an adapter for the unchanged base."""
        assert isinstance(model, peft.PeftModel)
        settings = model.peft_config[ADAPTER]
        assert isinstance(settings, peft.LoraConfig)
        if not self.config.moves_base or settings.init_lora_weights is True:  # True: already converted
            super().export(model, weights, out)
            return
        start = self.start if self.start_file is None else read_start(self.start_file)
        assert start is not None
        doubled = copy.deepcopy(settings)
        double_rank(doubled)
        model.peft_config[ADAPTER] = doubled
        try:
            super().export(model, subtract(weights, start), out)
        finally:
            model.peft_config[ADAPTER] = settings


def _settings_of(config: LoraKeys, anatomy: Anatomy, targets: str | list[str]) -> peft.LoraConfig:
    """Return peft's settings; parts that text does not reach are neither adapted nor saved."""
    model = anatomy.model
    names = [name for name, _ in model.named_parameters()]
    rows = anatomy.token_rows if anatomy.new_token_ids else ()
    saved = keep_to_text("method.modules_to_save", config.modules_to_save, anatomy)
    parameters = keep_to_text("method.target_parameters", config.target_parameters, anatomy, names)
    return peft.LoraConfig(
        task_type=task_type_of(model),
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=[*saved, *anatomy.task_head] or None,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        init_lora_weights=True if config.moves_base else config.init_lora_weights,
        target_parameters=list(parameters) or None,
        trainable_token_indices={name: list(anatomy.new_token_ids) for name in rows} or None,
    )


def _row_problems(config: LoraKeys, rows: Sequence[str]) -> Iterator[Problem]:
    """Yield conflicts with `model.add_tokens`: peft cannot train single rows of a module that it adapts or saves."""
    for key in ("modules_to_save", "target_modules"):
        wanted = getattr(config, key)
        endings = [wanted] if isinstance(wanted, str) else wanted
        if taken := [name for name in rows if any(name == end or name.endswith(f".{end}") for end in endings)]:
            rule = f"{', '.join(taken)}: the rows of model.add_tokens learn there, and peft does one or the other"
            yield Problem(f"method.{key}", rule, "remove it, or set method=full")


def _layer_problems(config: LoraKeys, blocks: int, targets: str | list[str]) -> list[Problem]:
    problems = []
    if config.layers_to_transform is not None:
        if not config.layers_to_transform or max(config.layers_to_transform) >= blocks:
            rule = f"{config.layers_to_transform} is empty or exceeds the model's layers 0 to {blocks - 1}"
            problems.append(Problem("method.layers_to_transform", rule, "set it to some of these layers, or remove it"))
        if isinstance(targets, str):
            rule = "a regular expression in method.target_modules says itself which layers it means"
            problems.append(Problem("method.layers_to_transform", rule, "write the layers into it, or name endings"))
    ranks = {config.r, *config.rank_pattern.values()}
    if config.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
        rule = "the orthogonal initialization requires even ranks"
        problems.append(Problem("method.init_lora_weights", rule, "set method.r to an even number"))
    return problems


def _exclusion_problems(config: LoraKeys, model: nn.Module) -> list[Problem]:
    excluded = config.exclude_modules
    if isinstance(excluded, list):
        check_names("method.exclude_modules", excluded, model, [])
    elif excluded is not None and not any(re.fullmatch(excluded, name) for name, _ in model.named_modules()):
        rule = f"the regular expression {excluded!r} matches no module's full name"
        return [Problem("method.exclude_modules", rule, "correct or remove it")]
    return []


def _within(layers: list[int], targets: list[str]) -> list[str]:
    """Remove full names in other layers from the targets, since peft applies `layers_to_transform` only to endings."""
    numbers = {target: re.search(r"\.(\d+)\.", target) for target in targets}
    return [target for target, number in numbers.items() if number is None or int(number[1]) in layers]


def _pattern_problems(config: LoraKeys, adapted: list[str]) -> list[Problem]:
    """Return a problem for each pattern that matches no adapted module, with the matching rule of peft."""
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in adapted}))
                rule = f"{pattern!r} matches no adapted module"
                problems.append(Problem(f"method.{key}", rule, f"the adapted modules are {endings}"))
    return problems


def _resolve_targets(targets: str | list[str], anatomy: Anatomy) -> str | list[str]:
    """Return the targets for peft: name endings, or full names if the endings would also match other modules."""
    model, linears = anatomy.model, anatomy.linears
    if targets == "all-linear":
        if not linears:
            raise RequestError.of(
                "method.target_modules", "all-linear matches no linear layer of this model", "name modules to adapt"
            )
        return sorted(linears) if _ambiguous(linears, model) else sorted({name.rsplit(".", 1)[-1] for name in linears})
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        if not any(re.fullmatch(targets, name) for name, _ in model.named_modules()):
            raise RequestError.of(
                "method.target_modules",
                f"the regular expression {targets!r} matches no module's full name",
                f"names look like {next(iter(linears), 'none')}",
            )
        return targets
    names = [targets] if isinstance(targets, str) else list(targets)
    check_names("method.target_modules", names, model, sorted({name.rsplit(".", 1)[-1] for name in linears}))
    return names


def _ambiguous(linears: Sequence[str], model: nn.Module) -> bool:
    """Return whether an ending of the targets also matches another linear layer, such as a router or the head."""
    endings = {name.rsplit(".", 1)[-1] for name in linears}
    return any(
        isinstance(module, nn.Linear | Conv1D) and name not in linears and name.rsplit(".", 1)[-1] in endings
        for name, module in model.named_modules()
    )


def _check_parameters(config: LoraKeys, model: nn.Module) -> None:
    """Check that `target_parameters` match parameters and are not combined with settings that peft does not support."""
    key, problems = "method.target_parameters", []
    names = [name for name, _ in model.named_parameters()]
    fused = sorted({".".join(n.split(".")[-3:]) for n, p in model.named_parameters() if p.ndim == 3})
    for want in config.target_parameters:
        if not any(name == want or name.endswith("." + want) for name in names):
            way_out = f"the model's fused parameters are {', '.join(fused[:6])}" if fused else "use target_modules"
            problems.append(Problem(key, f"{want!r} matches no parameter", way_out))
        owners = (name.rpartition(".") for name in names if name == want or name.endswith("." + want))
        outside = next((f"{owner}.{own}" for owner, _, own in owners if is_used_directly(model, owner, own)), None)
        if outside:
            rule = f"the parent of {outside} computes with it without calling its module, which an adapter cannot see"
            problems.append(Problem(key, rule, "leave it out"))
    for setting in ("use_dora", "lora_dropout"):
        if config.target_parameters and getattr(config, setting):
            rule = f"adapters of parameters (fused experts, routers) cannot have method.{setting}"
            problems.append(Problem(f"method.{setting}", rule, "remove it, or leave these parameters out"))
    if problems:
        raise RequestError(*problems)


def _keep_from_experts(settings: peft.LoraConfig, model: nn.Module, *, all_linear: bool) -> None:
    """Leave out linear layers that peft would replace by fused experts, or refuse them if they were named.

    For mixtures that were not fused in transformers 4 (DeepSeek-V3, Qwen-MoE), peft interprets gate_proj, up_proj and
    down_proj as the old names of the experts. It adapts the fused experts instead of dense MLPs and shared experts,
    also when the adapter is loaded (peft.utils.transformers_weight_conversion).
    """
    asked = set(settings.target_parameters or ())
    trial = copy.deepcopy(settings)
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError as error:
        raise RequestError.of("method.target_modules", str(error), "use method.target_parameters") from error
    unasked = sorted(set(trial.target_parameters or ()) - asked)
    if not unasked:
        return
    lost = sorted({name.rsplit(".", 1)[-1] for name in set(settings.target_modules or ()) - set(trial.target_modules)})
    if not all_linear:
        rule = f"peft interprets {', '.join(lost)} as the fused {', '.join(unasked)} in this model"
        way_out = "remove them; to adapt experts set method.target_parameters, and for routers moe.router=adapt"
        raise RequestError.of("method.target_modules", rule, way_out)
    settings.target_modules = trial.target_modules
    warnings.warn(f"all-linear leaves out {', '.join(lost)}: peft would adapt fused experts instead", stacklevel=2)


def _check_packed_copies(config: LoraKeys, model: nn.Module) -> None:
    """Check that no module of `modules_to_save` has packed weights, which cannot be trained."""
    problems = []
    packed = find_packed(model)
    for want in config.modules_to_save:
        inside = [n for n in packed if re.search(rf"(^|\.){re.escape(want)}\.", n)]
        if inside:
            rule = f"{want!r} would be trained in full, but {inside[0]} is packed in {packed[inside[0]].scheme}"
            problems.append(Problem("method.modules_to_save", rule, "adapt it, or set model.quantization=none"))
    if problems:
        raise RequestError(*problems)


def _explain_packed_experts(model: nn.Module, error: ValueError) -> None:
    """Raise an error that explains why peft cannot adapt packed experts, if this is the cause of `error`.

    peft interprets names such as gate_proj as the fused experts that contain them since transformers 5.
    """
    packed = [name for name, entry in find_packed(model).items() if len(entry.shape) > 2]
    if packed and "dimensional Parameter" in str(error):
        rule = f"peft would adapt fused experts, but {packed[0]} is packed in {find_packed(model)[packed[0]].scheme}"
        way_out = "set method.target_modules to the attention's layers, or model.quantization=none"
        raise RequestError.of("method.target_modules", rule, way_out) from error
