"""Norm tuning by peft (Zhao et al. 2023, arXiv 2312.11420): copies of the norms are trained."""

from __future__ import annotations

import peft
from torch import nn

from ..config.method import LnTuningConfig
from ..errors import RequestError
from ..state import Anatomy
from .through_peft import ThroughPeft, check_names, keep_to_text, task_type_of


class LnTuning(ThroughPeft):
    """The method `ln_tuning`."""

    config: LnTuningConfig

    def __init__(self, config: LnTuningConfig) -> None:
        self.config = config

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and add trainable copies of its norms.

        Raises:
            RequestError: A target matches nothing, or the model has no norm with weights.
        """
        model = anatomy.model
        endings = sorted({name.rsplit(".", 1)[-1] for name in anatomy.norms})
        if not endings:
            raise RequestError.of("method", "the model has no norm with weights", "set method=lora")
        targets = self.config.target_modules or endings
        check_names("method.target_modules", targets, model, endings)
        settings = peft.LNTuningConfig(
            task_type=task_type_of(model),
            target_modules=keep_to_text("method.target_modules", targets, anatomy),
            modules_to_save=list(anatomy.task_head) or None,
        )
        return peft.get_peft_model(model, settings)
