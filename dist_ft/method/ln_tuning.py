"""Norm tuning by peft (Zhao et al. 2023, arXiv 2312.11420): copies of the norms learn."""

from __future__ import annotations

import peft
from torch import nn

from ..config.method import LnTuningConfig
from ..errors import RequestError
from ..model.anatomy import find_norms
from .through_peft import ThroughPeft, check_names, task_head, task_type_of


class LnTuning(ThroughPeft):
    """See the module."""

    config: LnTuningConfig

    def __init__(self, config: LnTuningConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put trainable copies beside its norms.

        Raises:
            RequestError: a target matches nothing, or the model has no norm with weights.
        """
        endings = sorted({name.rsplit(".", 1)[-1] for name in find_norms(model)})
        if not endings:
            raise RequestError.of("method", "the model has no norm with weights", "choose method=lora")
        targets = self.config.target_modules or endings
        check_names("method.target_modules", targets, model, endings)
        settings = peft.LNTuningConfig(
            task_type=task_type_of(model), target_modules=targets, modules_to_save=task_head(model) or None
        )
        return peft.get_peft_model(model, settings)
