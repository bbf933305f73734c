"""What a router's forward returns, found by calling a copy of it on random input."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from .anatomy import Mixture, unwrap


@dataclass(frozen=True)
class RouterForm:
    """What a router's forward gives: found by calling a copy of it, so that nothing is taken for what it is not."""

    logits_at: int | None  # index of the raw logits in its outputs; None: they are its only output
    indices_at: int | None  # index of the chosen experts; None: the top_k of the logits
    top_k: int
    sigmoid: bool  # scores are sigmoids and not a softmax (DeepSeek-V3)


def find_form(mixture: Mixture, model: nn.Module) -> RouterForm:
    """Call a copy of the router on random tokens and see which output is `x @ weight.T + bias`.

    Several models return probabilities where logits are expected (transformers #45120), and a balance loss over them
    takes the softmax twice. Raw logits are recognised here by their values, never by their place.

    Raises:
        RequestError: none of the outputs are raw logits.
    """
    dice = torch.Generator().manual_seed(0)
    router = copy.deepcopy(unwrap(mixture.router)).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=dice, device="cpu"))
        for buffer in router.buffers():
            buffer.zero_()
        weight, bias = getattr(router, "weight"), getattr(router, "bias", None)  # noqa: B009  # typed as any module's
        x = torch.randn(5, weight.shape[1], generator=dice, device="cpu")
        expected = functional.linear(x, weight, bias)
        outputs = router(x)
    if isinstance(outputs, Tensor):
        logits_at, indices_at = (None if _is(outputs, expected) else -1), None
        outputs = (outputs,)
    else:
        logits_at = next((i for i, output in enumerate(outputs) if _is(output, expected)), -1)
        indices_at = next((i for i, output in enumerate(outputs) if output.dtype == torch.int64), None)
    if logits_at == -1:
        rule = f"{mixture.router_name} does not give the logits that it chooses experts by"
        raise RequestError.of("model.name_or_path", rule, "its routing cannot be seen; use a model of transformers")
    if indices_at is None:
        top_k = int(getattr(getattr(model, "config", None), "num_experts_per_tok", 0) or 1)
        return RouterForm(logits_at, None, top_k, False)
    chosen = outputs[indices_at]
    others = [o for i, o in enumerate(outputs) if i not in (logits_at, indices_at) and o.shape == chosen.shape]
    return RouterForm(logits_at, indices_at, chosen.shape[-1], bool(others) and _sigmoid(others[0], expected, chosen))


def _is(output: Tensor, expected: Tensor) -> bool:
    return output.shape == expected.shape and torch.allclose(output.float(), expected, rtol=1e-4, atol=1e-5)


def _sigmoid(weights: Tensor, logits: Tensor, chosen: Tensor) -> bool:
    """Whether the weights of the chosen experts stand to each other as sigmoids of their logits do."""
    scores = logits.sigmoid().gather(1, chosen)
    return torch.allclose(weights / weights.sum(-1, keepdim=True), scores / scores.sum(-1, keepdim=True), rtol=1e-3)
