"""The format of a router's output, found by calling a copy of the router on random input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from ..state import RouterForm


def find_form(router: nn.Module, name: str, config: Any) -> RouterForm:
    """Call a copy of the router on random tokens and find the output that equals `x @ weight.T + bias`.

    Several models return probabilities in place of logits (transformers #45120), and a balance loss over them would
    apply the softmax twice. Raw logits are therefore recognized by their values and not by their position.

    Args:
        router: Module with an `[experts, hidden]` weight; it may be on the meta device.
        name: Name of the router, for errors.
        config: The model's configuration, or None.

    Raises:
        RequestError: None of the outputs are the raw logits.
    """
    generator = torch.Generator().manual_seed(0)
    router = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
        for buffer in router.buffers():
            buffer.zero_()
        weight, bias = getattr(router, "weight"), getattr(router, "bias", None)  # noqa: B009  # typed as any module's
        x = torch.randn(5, weight.shape[1], generator=generator, device="cpu")
        expected = functional.linear(x, weight, bias)
        outputs = router(x)
    if isinstance(outputs, Tensor):
        logits_at, indices_at = (None if _is(outputs, expected) else -1), None
        outputs = (outputs,)
    else:
        logits_at = next((i for i, output in enumerate(outputs) if _is(output, expected)), -1)
        indices_at = next((i for i, output in enumerate(outputs) if output.dtype == torch.int64), None)
    if logits_at == -1:
        rule = f"{name} does not return the logits that it chooses experts by, so its routing cannot be measured"
        raise RequestError.of("model.name_or_path", rule, "use a mixture of experts that transformers implements")
    if indices_at is None:
        top_k = int(getattr(config, "num_experts_per_tok", 0) or 1)
        return RouterForm(logits_at, None, top_k, False)
    chosen = outputs[indices_at]
    others = [o for i, o in enumerate(outputs) if i not in (logits_at, indices_at) and o.shape == chosen.shape]
    return RouterForm(logits_at, indices_at, chosen.shape[-1], bool(others) and _sigmoid(others[0], expected, chosen))


def _is(output: Tensor, expected: Tensor) -> bool:
    return output.shape == expected.shape and torch.allclose(output.float(), expected, rtol=1e-4, atol=1e-5)


def _sigmoid(weights: Tensor, logits: Tensor, chosen: Tensor) -> bool:
    """Return whether the weights of the chosen experts are proportional to the sigmoids of their logits."""
    scores = logits.sigmoid().gather(1, chosen)
    return torch.allclose(weights / weights.sum(-1, keepdim=True), scores / scores.sum(-1, keepdim=True), rtol=1e-3)
