"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): only the biases of all layers and norms are trained."""

from __future__ import annotations

from torch import nn

from ..config.method import BitfitConfig
from ..errors import RequestError
from ..model.reach import lies_in
from ..state import Anatomy
from .full import Full, freeze_idle, train_head


class Bitfit(Full):
    """The method `bitfit`. Exported as a full model, because there is no adapter format for biases."""

    config: BitfitConfig

    def __init__(self, config: BitfitConfig) -> None:
        super().__init__(config)

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Make the parameters named `bias` trainable.

        Raises:
            RequestError: The model has no biases.
        """
        self.keep_buffers(anatomy)
        model = anatomy.model.requires_grad_(False)
        routers = [mixture.router for mixture in anatomy.mixtures]
        named = [(name, p) for name, p in model.named_parameters() if not lies_in(name, routers)]
        biases = [p for name, p in named if name.rsplit(".", 1)[-1] == "bias"]
        if not biases:
            rule = f"{type(model).__name__} has no biases, so that bitfit would train nothing"
            raise RequestError.of("method", rule, "set method=ln_tuning or method=ia3, which train as few parameters")
        for bias in biases:
            bias.requires_grad_(True)
        train_head(anatomy)
        freeze_idle(anatomy)
        if not any(bias.requires_grad for bias in biases):
            rule = f"{type(model).__name__} has biases only in parts that text does not reach"
            raise RequestError.of("method", rule, "set method=ln_tuning or method=lora")
        return model
