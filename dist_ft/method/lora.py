"""LoRA (Hu et al. 2021) by peft, with targets that must match: neither the head nor a router is adapted unasked."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from pathlib import Path
from typing import cast

import peft
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from ..errors import Problem, RequestError
from ..model.structure import find_linears
from ..schema import LoraConfig
from ..state import Weights


class Lora:
    """See the module; DoRA and rsLoRA are settings of it."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put adapters beside the target modules.

        Raises:
            RequestError: a target, or a module to save, matches nothing.
        """
        targets = _resolve_targets(self.config.target_modules, model)
        _check_names("method.modules_to_save", self.config.modules_to_save, model, [])
        _check_parameters(self.config, model)
        settings = peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=self.config.r,
            lora_alpha=cast(int, self.config.lora_alpha),
            lora_dropout=self.config.lora_dropout,
            target_modules=targets,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
            modules_to_save=self.config.modules_to_save or None,
            target_parameters=self.config.target_parameters or None,
        )
        _keep_from_experts(settings, model, all_linear=self.config.target_modules == "all-linear")
        return peft.get_peft_model(model, settings)

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in peft's form."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        assert isinstance(model, peft.PeftModel)
        # The embeddings are either untouched or in modules_to_save; peft must not go and look at the hub for them.
        model.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)


def _resolve_targets(targets: str | list[str], model: nn.Module) -> str | list[str]:
    """What peft is told: the endings of names that stand for exactly the modules meant."""
    linears = find_linears(model)
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
    _check_names("method.target_modules", names, model, sorted({name.rsplit(".", 1)[-1] for name in linears}))
    return names


def _ambiguous(linears: dict[str, nn.Linear], model: nn.Module) -> bool:
    """Whether an ending of the targets also names another linear layer, such as a router or the head."""
    endings = {name.rsplit(".", 1)[-1] for name in linears}
    return any(
        isinstance(module, nn.Linear) and name not in linears and name.rsplit(".", 1)[-1] in endings
        for name, module in model.named_modules()
    )


def _check_names(key: str, wanted: list[str], model: nn.Module, usual: list[str]) -> None:
    """Each of `wanted` must be a module's name or the end of one, at a dot; `usual` names are shown where none is near."""
    problems = []
    names = [name for name, _ in model.named_modules() if name]
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    for want in wanted:
        if not any(name == want or name.endswith("." + want) for name in names):
            near = difflib.get_close_matches(want, endings, n=3) or usual or [e for e in endings if not e.isdigit()]
            problems.append(Problem(key, f"{want!r} matches no module", f"the model has {', '.join(near[:12])}"))
    if problems:
        raise RequestError(*problems)


def _check_parameters(config: LoraConfig, model: nn.Module) -> None:
    """Each of `target_parameters` must be the end of a parameter's name, and nothing set that peft cannot do there."""
    key, problems = "method.target_parameters", []
    names = [name for name, _ in model.named_parameters()]
    fused = sorted({".".join(n.split(".")[-3:]) for n, p in model.named_parameters() if p.ndim == 3})
    for want in config.target_parameters:
        if not any(name == want or name.endswith("." + want) for name in names):
            way_out = f"the model's fused parameters are {', '.join(fused[:6])}" if fused else "use target_modules"
            problems.append(Problem(key, f"{want!r} matches no parameter", way_out))
    for setting in ("use_dora", "lora_dropout"):
        if config.target_parameters and getattr(config, setting):
            rule = f"adapters of parameters (fused experts, routers) cannot have method.{setting}"
            problems.append(Problem(f"method.{setting}", rule, "remove it, or leave these parameters out"))
    if problems:
        raise RequestError(*problems)


def _keep_from_experts(settings: peft.LoraConfig, model: nn.Module, *, all_linear: bool) -> None:
    """Have peft adapt the linear layers that are named, or say that it cannot.

    In mixtures that were not fused in transformers 4 (DeepSeek-V3, Qwen-MoE), peft takes gate_proj, up_proj and
    down_proj for the experts' old names: it adapts the fused experts instead of dense MLPs and shared experts, here and
    again wherever the adapter is loaded (peft.utils.transformers_weight_conversion).
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
        rule = f"peft takes {', '.join(lost)} for the fused {', '.join(unasked)} in this model"
        way_out = "leave them out; to adapt experts name method.target_parameters, and routers by moe.router=adapt"
        raise RequestError.of("method.target_modules", rule, way_out)
    settings.target_modules = trial.target_modules
    warnings.warn(f"all-linear leaves out {', '.join(lost)}: peft would adapt fused experts instead", stacklevel=2)
