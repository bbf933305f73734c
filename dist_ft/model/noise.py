"""Random regularization of the model: dropout rates, and noise on embeddings (NEFTune).

Both draw from torch's generator for each micro-batch. With either of them, two runs have the same loss curve only with
the same engine, world size and micro-batch size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import RequestError
from ..process.comm import send


def set_dropout(settings: PreTrainedConfig, rate: float) -> None:
    """Set every dropout rate of a model's configuration and of its sub-configurations, except `layerdrop` rates.

    Raises:
        RequestError: The configuration has no dropout rate.
    """
    found = 0
    below = [value for value in vars(settings).values() if isinstance(value, PreTrainedConfig)]
    for part in (settings, *below):
        for key in [key for key in vars(part) if key.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate"))]:
            if not isinstance(getattr(part, key), bool):  # null refers to the rate of another key
                setattr(part, key, rate)
                found += 1
    if not found:
        rule = f"models of type {settings.model_type} have no dropout"
        raise RequestError.of("model.dropout", rule, "remove it; for LoRA, use method.lora_dropout")


def add_embedding_noise(model: nn.Module, embeddings: nn.Module, alpha: float) -> None:
    """Add uniform noise to the embeddings in training mode: NEFTune (Jain et al. 2023, algorithm 1).

    A document of L tokens with d features gets noise of at most alpha / sqrt(L d), as with `neftune_noise_alpha` of
    transformers and TRL, but by its own length: padding and other documents of the batch do not change it. It is drawn
    from torch's generator, as dropout is, and thus depends on rank and micro-batch: `loop.step_seed` makes it the same
    in a resumed run, but not on another world size or with another micro-batch size.

    Args:
        model: The model; its inputs contain the lengths of the documents.
        embeddings: The input embeddings, with output `[batch, seq, d]`.
        alpha: 5 to 15 in the paper.
    """
    lengths: list[Tensor] = []  # of each token's document, [batch, seq]

    def see(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        lengths[:] = [_lengths_of(inputs)]

    def add(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        is_known = bool(lengths) and lengths[0].shape == output.shape[:2]  # not of a decoder or a prompt encoder
        if not module.training or not is_known:
            return output
        reach = alpha / (send(lengths[0], output.device) * output.shape[-1]).float().sqrt()
        return output + (torch.rand_like(output, dtype=torch.float32) * 2 - 1).mul(reach[..., None]).to(output.dtype)

    model.register_forward_pre_hook(see, with_kwargs=True)
    embeddings.register_forward_hook(add)


def _lengths_of(inputs: dict[str, Any]) -> Tensor:
    """Return the length of the document that each token belongs to, `[batch, seq]`."""
    if "document_lengths" in inputs:
        documents = torch.tensor(inputs["document_lengths"])
        return documents.repeat_interleave(documents)[None]
    mask: Tensor = inputs["attention_mask"]
    return mask.sum(dim=1, keepdim=True).clamp(min=1).expand_as(mask)
