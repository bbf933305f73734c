"""Every kernel that this machine has agrees with the plain formula, in models too, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_ft.model.attention import available, kernels
from dist_ft.model.attention.boundaries import Boundaries
from dist_ft.model.attention.choice import IN_ONE_CALL, choose_attention
from dist_ft.model.attention.documents import DOCUMENTS, KERNELS, SINKS, SOFTCAP
from dist_ft.testing import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
LENGTHS = (33, 7, 1, 320, 64)
FORMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, set()),
    "window": ({"window": 40}, set()),
    "softcap": ({"softcap": 5.0}, {SOFTCAP}),
    "sinks-window": ({"sinks": torch.linspace(-1, 2, 8), "window": 64}, {SINKS}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "gemma2-softcap-window": ("gemma2", {"sliding_window": 30}),
    "gpt-oss-sinks": ("gpt_oss", {"sliding_window": 30}),
    "deepseek-narrow-values": ("deepseek_v3", {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kernel", IN_ONE_CALL)
def test_outputs_and_gradients(kernel: str, width: int, form: str) -> None:
    given, asks = FORMS[form]
    why = available.why_not(kernel, available.Heads(4, ((width, width),), frozenset(asks)), DEVICE, torch.bfloat16)
    if why is not None:
        assert "computes wrong" not in why, f"{kernel} {why}"  # the trial protects runs, but it must not hide this here
        pytest.skip(f"{kernel} {why}")
    torch.manual_seed(0)
    sizes = [(8, width), (2, width), (2, width)]
    inputs = [torch.randn(sum(LENGTHS), *size, device=DEVICE).bfloat16().requires_grad_() for size in sizes]
    along = torch.randn(sum(LENGTHS), 8, width, device=DEVICE).bfloat16()
    keys = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    found = []
    for compute in (KERNELS[DOCUMENTS[kernel]], kernels.reference):
        output = compute(*inputs, Boundaries(LENGTHS, DEVICE), kernels.Form(**keys))
        found.append([output.detach(), *torch.autograd.grad(output, inputs, along)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).float().norm()) < 0.02 * float(b.float().norm())


@pytest.mark.parametrize("requested", ["auto", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_documents_stay_apart(name: str, requested: str) -> None:
    architecture, changes = MODELS[name]
    model = tiny.build(architecture, attn_implementation="eager", max_position_embeddings=512, **changes)
    model = model.cuda().bfloat16().eval()
    ids = torch.randint(0, 97, (1, sum(LENGTHS)), device="cuda")
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
        choice = choose_attention(requested, type(model), model.config, DEVICE, torch.bfloat16)
        assert choice.padding_free and (requested == "eager" or choice.kernel in IN_ONE_CALL), choice.reason
        model.set_attn_implementation(choice.implementation)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
        together = model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS, use_cache=False).logits
    assert float((together - apart).float().norm()) < 2e-2 * float(apart.float().norm())
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_micro_batch_never_waits() -> None:
    model = tiny.build("llama", max_position_embeddings=512).cuda().bfloat16()
    choice = choose_attention("auto", type(model), model.config, DEVICE, torch.bfloat16)
    model.set_attn_implementation(choice.implementation)
    ids = torch.randint(0, 97, (1, sum(LENGTHS)), device="cuda")
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()

    def step(lengths: tuple[int, ...]) -> None:
        output = model(input_ids=ids, position_ids=positions, document_lengths=lengths, use_cache=False)
        output.logits.float().square().sum().backward()

    step(LENGTHS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(LENGTHS[::-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
