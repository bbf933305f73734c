"""Chance in training beside the order of the data: noise on embeddings, and the rate of a model's own dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import RequestError


def set_dropout(settings: PreTrainedConfig, rate: float) -> None:
    """Set every rate of dropout that a model's configuration, or one below it, has.

    Not `layerdrop` rates, which leave out whole layers.

    Raises:
        RequestError: it has none.
    """
    found = 0
    below = [value for value in vars(settings).values() if isinstance(value, PreTrainedConfig)]
    for part in (settings, *below):
        for key in [key for key in vars(part) if key.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate"))]:
            if not isinstance(getattr(part, key), bool):  # null stands for another key's rate
                setattr(part, key, rate)
                found += 1
    if not found:
        rule = f"{settings.model_type} models have no dropout"
        raise RequestError.of("model.dropout", rule, "remove it; LoRA has method.lora_dropout")


def add_embedding_noise(model: nn.Module, embeddings: nn.Module, alpha: float) -> None:
    """Uniform noise on the embeddings while the model trains: NEFTune (Jain et al. 2023, algorithm 1).

    A document of L tokens of d numbers gets noise of at most alpha / sqrt(L d), as `neftune_noise_alpha` gives it in
    transformers and TRL, but by its own length: neither padding nor its neighbours in a batch weaken it. It is drawn
    from torch's generator, as dropout is.

    Args:
        model: gets the micro-batch's inputs, and with them the documents' lengths.
        embeddings: its input embeddings, whose output is [B, T, d].
        alpha: 5 to 15 in the paper.
    """
    lengths: list[Tensor] = []  # of each token's document, [B, T]

    def see(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        lengths[:] = [_lengths_of(inputs)]

    def add(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        if not module.training or not lengths or lengths[0].shape != output.shape[:2]:  # a decoder's, or a prompt's
            return output
        reach = alpha / (lengths[0].to(output.device) * output.shape[-1]).float().sqrt()
        return output + (torch.rand_like(output, dtype=torch.float32) * 2 - 1).mul(reach[..., None]).to(output.dtype)

    model.register_forward_pre_hook(see, with_kwargs=True)
    embeddings.register_forward_hook(add)


def _lengths_of(inputs: dict[str, Any]) -> Tensor:
    """[B, T]: the length of the document that each token belongs to."""
    if "document_lengths" in inputs:
        documents = torch.tensor(inputs["document_lengths"])
        return documents.repeat_interleave(documents)[None]
    mask: Tensor = inputs["attention_mask"]
    return mask.sum(dim=1, keepdim=True).clamp(min=1).expand_as(mask)
