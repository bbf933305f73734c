"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases of all layers and norms learn, nothing else."""

from __future__ import annotations

from torch import nn

from ..config.method import BitfitConfig
from ..errors import RequestError
from ..state import Anatomy
from .full import Full, train_head


class Bitfit(Full):
    """See the module. Exported as a whole model, as biases have no place of their own in a model's folder."""

    config: BitfitConfig

    def __init__(self, config: BitfitConfig) -> None:
        super().__init__(config)

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """The same model, parameters called `bias` trainable.

        Raises:
            RequestError: there are none.
        """
        self.keep_buffers(anatomy)
        model = anatomy.model.requires_grad_(False)
        biases = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
        if not biases:
            rule = f"{type(model).__name__} has no biases, so bitfit would train nothing"
            raise RequestError.of("method", rule, "choose method=ln_tuning or method=ia3, which are as small")
        for bias in biases:
            bias.requires_grad_(True)
        train_head(anatomy)
        return model
