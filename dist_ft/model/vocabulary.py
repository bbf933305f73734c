"""Embeddings for added tokens: the input embeddings, and an untied head, get one row for each new token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..state import Architecture


def grow_settings(settings: PreTrainedConfig, architecture: Architecture) -> None:
    """Set the vocabulary size of `grow` in the configuration, for a model that is built and not loaded."""
    if architecture.vocabulary:
        settings.get_text_config().vocab_size = architecture.vocabulary


def grow(model: PreTrainedModel, architecture: Architecture) -> None:
    """Add the missing rows to a loaded model, each the mean of all old rows; old rows are unchanged.

    transformers draws new rows around this mean, with the covariance of the old ones times 1e-9 (Hewitt 2021). The mean
    itself is the same on every machine and needs no decomposition of a large matrix.
    """
    if not architecture.vocabulary:
        return
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(architecture.vocabulary, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if tensor is not None:
                _fill(tensor, old)


@torch.no_grad()
def _fill(tensor: Tensor, old: int) -> None:
    tensor[old:] = tensor[:old].float().mean(dim=0).to(tensor.dtype)
