"""LoRA (Hu et al. 2021) by peft, with targets that must match: neither the head nor a router is adapted unasked."""

from __future__ import annotations

import re
from typing import cast

import peft
from torch import nn

from ..errors import RequestError
from ..model.structure import find_linears
from ..schema import LoraConfig
from .through_peft import ThroughPeft, check_names


class Lora(ThroughPeft):
    """See the module; DoRA and rsLoRA are settings of it."""

    config: LoraConfig

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put adapters beside the target modules.

        Raises:
            RequestError: a target, or a module to save, matches nothing.
        """
        targets = _resolve_targets(self.config.target_modules, model)
        check_names("method.modules_to_save", self.config.modules_to_save, model, [])
        settings = peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=self.config.r,
            lora_alpha=cast(int, self.config.lora_alpha),
            lora_dropout=self.config.lora_dropout,
            target_modules=targets,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
            modules_to_save=self.config.modules_to_save or None,
        )
        return peft.get_peft_model(model, settings)


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
    check_names("method.target_modules", names, model, sorted({name.rsplit(".", 1)[-1] for name in linears}))
    return names


def _ambiguous(linears: dict[str, nn.Linear], model: nn.Module) -> bool:
    """Whether an ending of the targets also names another linear layer, such as a router or the head."""
    endings = {name.rsplit(".", 1)[-1] for name in linears}
    return any(
        isinstance(module, nn.Linear) and name not in linears and name.rsplit(".", 1)[-1] in endings
        for name, module in model.named_modules()
    )
