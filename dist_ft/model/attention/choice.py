"""The attention kernel of a run, and whether its micro-batches have padding."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import MachineError, RequestError
from ..isolation import Isolation, isolation_of
from .available import heads_of, why_missing, why_not
from .documents import DOCUMENTS

IN_ONE_CALL = ("flash_attention_4", "flash_attention_3", "varlen", "flash_attention_2", "flex_attention")  # best first


@dataclass(frozen=True)
class AttentionChoice:
    """The attention implementation that `model.attn_implementation` resolved to, and the layout of micro-batches.

    Attributes:
        kernel: One of the values of `model.attn_implementation`.
        implementation: Name of the attention function in transformers.
        padding_free: Whether micro-batches are documents in one row without padding.
        reason: Why this kernel.
        why_padded: Why micro-batches are padded; None if they are not.
        why_single: Why a micro-batch has one row only; None if it can have several.
        for_padding: The kernel over padded rows with a mask; `kernel` if None.
    """

    kernel: str
    implementation: str
    padding_free: bool
    reason: str
    why_padded: str | None = None
    why_single: str | None = None
    for_padding: str | None = None

    def padded(self, reason: str) -> AttentionChoice:
        """Return the choice for padded rows with a mask."""
        why, kernel = self.why_padded or reason, self.for_padding or self.kernel
        return replace(self, kernel=kernel, implementation=kernel, padding_free=False, why_padded=why)


def choose_attention(
    requested: str,
    model_class: type[PreTrainedModel],
    settings: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    causal: bool = True,
) -> AttentionChoice:
    """Resolve `auto`, and determine whether documents can be laid out without padding.

    On GPUs, cuDNN's SDPA is switched off: its backward returns NaN under a mask (pytorch issue 196678).

    Args:
        requested: `model.attn_implementation`.
        model_class: Class of the model.
        settings: Configuration of the model.
        device: Where the model computes.
        dtype: In which it computes.
        causal: Whether the model is a causal language model; rows of other models are always padded.

    Raises:
        MachineError: A kernel is requested by name and cannot run on this machine.
        RequestError: The model does not support the requested implementation.
    """
    name, has_sdpa = model_class.__name__, bool(getattr(model_class, "_supports_sdpa", False))
    if requested in IN_ONE_CALL and (missing := why_missing(requested, device, dtype)):
        raise MachineError.of(
            "model.attn_implementation", f"{requested} {missing}", "set model.attn_implementation=auto or sdpa"
        )
    if requested == "sdpa" and not has_sdpa:
        raise RequestError.of("model.attn_implementation", f"{name} has no {requested}", "set it to auto or eager")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    for_padding, why = _choose_for_padding(requested, model_class, device, dtype)
    if not causal:
        return _padded_choice(requested, for_padding, why, f"{name} is no causal language model")
    proven = "sdpa" if has_sdpa else "eager"  # the kernels differ in speed only
    isolation = isolation_of(
        model_class, settings, proven, DOCUMENTS[proven] if _takes_documents(model_class) else None
    )
    if isolation.documents is not None:
        return _padded_choice(requested, for_padding, why, isolation.documents, isolation.padding)
    kernel, reason = _choose_for_documents(requested, proven, name, isolation, settings, device, dtype)
    return AttentionChoice(
        kernel, DOCUMENTS[kernel], True, reason, why_single=isolation.padding, for_padding=for_padding
    )


def _choose_for_documents(
    requested: str,
    proven: str,
    name: str,
    isolation: Isolation,
    settings: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[str, str]:
    """Return the kernel for rows of documents, and why.

    Raises:
        RequestError: A kernel is requested that cannot compute the model's attention.
    """
    if requested in ("sdpa", "eager"):
        return requested, "as configured"
    heads, failed = heads_of(settings, isolation.asks), {}
    for kernel in IN_ONE_CALL if requested == "auto" else (requested,):
        failed[kernel] = isolation.one_call or why_not(kernel, heads, device, dtype)
        if failed[kernel] is None:
            return kernel, "as configured" if requested != "auto" else _praise(kernel, failed)
    if requested != "auto":
        rule, way_out = f"{requested} {failed[requested]}", "set model.attn_implementation=auto"
        raise RequestError.of("model.attn_implementation", rule, way_out)
    if device.type != "cuda":
        needs = "kernels that compute all documents in one call need a GPU"
        return proven, needs if proven == "sdpa" else f"{name} supports nothing else"
    if isolation.one_call:
        return proven, f"document by document, which is slow: {isolation.one_call}"
    reasons = "; ".join(f"{kernel} {why}" for kernel, why in failed.items())
    return proven, f"document by document, which is slow: {reasons}"


def _praise(kernel: str, failed: dict[str, str | None]) -> str:
    """Return why `auto` took a kernel: what the better ones lack, of those that are installed."""
    lacking = [f"{other} {why}" for other, why in failed.items() if why and not why.startswith("needs")]
    return "; ".join(["all documents in one call", *lacking])


def _choose_for_padding(
    requested: str, model_class: type[PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Return the kernel of transformers for padded rows, and why."""
    if requested in ("sdpa", "eager"):
        return requested, "as configured"
    has_sdpa, missing = getattr(model_class, "_supports_sdpa", False), why_missing("flash_attention_2", device, dtype)
    if missing is None and _supports_flash(model_class):
        return "flash_attention_2", "the flash-attn package and a GPU are available"
    if has_sdpa:
        return "sdpa", f"flash_attention_2 {missing or f'is not supported by {model_class.__name__}'}"
    return "eager", f"{model_class.__name__} supports nothing else"


def _padded_choice(
    requested: str, kernel: str, reason: str, why_padded: str, why_single: str | None = None
) -> AttentionChoice:
    """Return the choice for a model whose rows are padded.

    Raises:
        RequestError: A kernel is requested that computes rows without padding only, or not this model.
    """
    if requested in IN_ONE_CALL and requested != kernel:
        rule = f"{requested} cannot be used: {why_padded}, so that rows are padded"
        raise RequestError.of("model.attn_implementation", rule, "set it to auto or sdpa")
    return AttentionChoice(kernel, kernel, False, reason, why_padded, why_single)


def _supports_flash(model_class: type[PreTrainedModel]) -> bool:
    """Return whether flash-attn 2 computes the model's attention; models with sinks name other implementations."""
    named = getattr(model_class, "_compatible_flash_implementations", None)
    return getattr(model_class, "_supports_flash_attn", False) and (named is None or "flash_attention_2" in named)


def _takes_documents(model_class: type[PreTrainedModel]) -> bool:
    """Whether keywords reach the attention function and logits can be asked for at chosen positions only."""
    return bool(getattr(model_class, "_supports_attention_backend", False)) and (
        "logits_to_keep" in inspect.signature(model_class.forward).parameters
    )
