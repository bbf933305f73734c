"""Kernels that compute all documents in one call agree with each other and with documents alone, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft.model.attention import flex, kernels
from dist_ft.model.attention.boundaries import Boundaries
from dist_ft.model.attention.documents import DOCUMENTS, REFERENCE
from dist_ft.model.attention.flex import needed_blocks
from dist_ft.testing import tiny

LENGTHS = (9, 1, 140, 106)
KERNELS = {
    "varlen": (kernels.varlen, "torch_flash"),
    "flash_attention_2": (kernels.flash_attention_2, "flash_attn"),
    "flex_attention": (flex.flex_attention, "flex"),
    "reference": (kernels.reference, "torch_flash"),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.5},
    "window": {"window": 5},
    "wide-window": {"window": 130},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([1.0, -1.0, 0.5, 2.0])},
    "sinks-window-softcap": {"sinks": torch.tensor([1.0, -1.0, 0.5, 2.0]), "window": 7, "softcap": 2.0},
}
NAMES = DOCUMENTS | {"reference": REFERENCE}
LACK = {"varlen": ("softcap", "sinks"), "flash_attention_2": ("sinks",)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "gemma2-softcap-window": ("gemma2", {"sliding_window": 4}),
    "gpt-oss-sinks": ("gpt_oss", {"sliding_window": 6}),
    "deepseek-narrow-values": ("deepseek_v3", {}),
}


def dense(query: Tensor, key: Tensor, value: Tensor, form: dict[str, Any]) -> Tensor:
    """One softmax over all tokens with the mask of all documents, in float64."""
    numbers = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    distance = torch.arange(len(numbers))[:, None] - torch.arange(len(numbers))
    sees = (numbers[:, None] == numbers) & (distance >= 0) & (distance < form.get("window", 10**6))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * form.get("scale", query.shape[-1] ** -0.5)
    if "softcap" in form:
        scores = form["softcap"] * (scores / form["softcap"]).tanh()
    weights = scores.masked_fill(~sees, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if "sinks" in form:
        total = total + form["sinks"].to(total).exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("widths", [(16, 16), (20, 12), (12, 20)])
def test_every_kernel_computes_the_same(
    name: str, form: str, widths: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    kernel, fixture = KERNELS[name]
    request.getfixturevalue(fixture)
    torch.manual_seed(0)
    tokens, boundaries = sum(LENGTHS), Boundaries(LENGTHS, torch.device("cpu"))
    shapes = [(tokens, 4, widths[0]), (tokens, 2, widths[0]), (tokens, 2, widths[1])]
    given = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    along = torch.randn(tokens, 4, widths[1]).bfloat16()
    if set(FORMS[form]) & set(LACK.get(name, ())):
        with pytest.raises(AssertionError, match=r"has none|no sinks"):
            kernel(*given, boundaries, kernels.Form(**FORMS[form]))
        return
    output = kernel(*given, boundaries, kernels.Form(**FORMS[form]))
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = dense(*exact, FORMS[form])
    assert output.shape == expected.shape and output.dtype == torch.bfloat16
    found = [output.detach(), *torch.autograd.grad(output, given, along)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, along.double())]
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.02  # rounding to bfloat16


@pytest.mark.usefixtures("flex")
def test_sinks_get_their_gradient() -> None:
    torch.manual_seed(0)
    given = [torch.randn(sum(LENGTHS), heads, 16) for heads in (4, 2, 2)]
    gradients = []
    for kernel in (flex.flex_attention, kernels.reference):
        sinks = FORMS["sinks"]["sinks"].clone().requires_grad_()
        output = kernel(*given, Boundaries(LENGTHS, torch.device("cpu")), kernels.Form(sinks=sinks))
        gradients.append(torch.autograd.grad(output.square().sum(), sinks)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 100, 128, 129, 300, 1000])
def test_no_block_is_skipped_that_a_token_needs(window: int) -> None:
    lengths = (1, 127, 128, 200, 56, 3, 253)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = torch.arange(len(numbers))[:, None] - torch.arange(len(numbers))
    sees = (numbers[:, None] == numbers) & (distance >= 0) & (distance < window)
    blocks = sees.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    partial, full = (torch.from_numpy(found) for found in needed_blocks(lengths, window))
    assert torch.equal(full, blocks.all(dim=3).all(dim=1))
    assert torch.equal(partial | full, blocks.any(dim=3).any(dim=1)) and not (partial & full).any()


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *((name, kernel) for name in ("llama", "mistral-window", "deepseek-narrow-values") for kernel in KERNELS),
        ("gemma2-softcap-window", "flash_attention_2"),
        ("gemma2-softcap-window", "flex_attention"),
        ("gpt-oss-sinks", "flex_attention"),
    ],
)
def test_models_reach_the_kernel_with_their_boundaries(name: str, kernel: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(KERNELS[kernel][1])
    architecture, changes = MODELS[name]
    model = tiny.build(architecture, attn_implementation="eager", **changes).bfloat16().eval()
    lengths = (9, 1, 14, 6)
    ids = torch.randint(1, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    weights = {name: p for name, p in model.named_parameters() if "attn" in name}  # experts change by rounding
    along = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((alone.float() * along).sum(), list(weights.values()))
    model.set_attn_implementation(NAMES[kernel])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(input_ids=ids, position_ids=positions, document_lengths=lengths, use_cache=False).logits
    assert (
        float((together - alone).detach().float().norm() / alone.detach().float().norm()) < 0.02
    )  # rounding to bfloat16
    found = torch.autograd.grad((together.float() * along).sum(), list(weights.values()))
    for parameter, a, b in zip(weights, found, expected, strict=True):
        assert float((a - b).float().norm()) <= 0.1 * float(b.float().norm()) + 1e-3, parameter
