"""(IA)³ by peft (Liu et al. 2022, arXiv 2205.05638): trained factors on keys, values and MLP activations."""

from __future__ import annotations

import peft
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn

from ..config.method import Ia3Config
from ..errors import RequestError
from ..state import Anatomy
from .through_peft import ThroughPeft, check_names, keep_to_text, task_type_of


class Ia3(ThroughPeft):
    """The method `ia3`."""

    config: Ia3Config

    def __init__(self, config: Ia3Config) -> None:
        self.config = config

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and add factors, initialized to 1, to the target modules.

        Raises:
            RequestError: A target matches nothing, or peft has no default targets for this type of model.
        """
        model = anatomy.model
        kind = model.config.model_type  # type: ignore[union-attr]
        targets = self.config.target_modules or TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
        inner = self.config.feedforward_modules
        if inner is None:
            usual = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
            inner = [name for name in usual if name in (targets or [])]
        if not targets:
            way_out = "set it to the key and value projections and the MLP output, such as [k_proj, v_proj, down_proj]"
            raise RequestError.of(
                "method.target_modules", f"peft has no default targets for model type {kind}", way_out
            )
        check_names("method.target_modules", targets, model, [])
        if strange := sorted(set(inner) - set(targets)):
            rule = f"{', '.join(strange)} is not in method.target_modules"
            raise RequestError.of("method.feedforward_modules", rule, "add them to method.target_modules")
        kept = list(keep_to_text("method.target_modules", list(targets), anatomy))
        settings = peft.IA3Config(
            task_type=task_type_of(model),
            target_modules=kept,
            feedforward_modules=[
                name for name in kept if any(name == end or name.endswith(f".{end}") for end in inner)
            ],
            modules_to_save=list(anatomy.task_head) or None,
        )
        return peft.get_peft_model(model, settings)
