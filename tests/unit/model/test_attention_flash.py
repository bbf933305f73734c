"""FlashAttention without a GPU: a stand-in for flash-attn checks every argument and computes by plain softmax."""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft.model.attention import choose_attention
from dist_ft.testing import tiny

LENGTHS = (9, 1, 14, 6)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "gemma2-softcap-window": ("gemma2", {"sliding_window": 4}),
    "deepseek-narrow-values": ("deepseek_v3", {}),
}


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """The function of flash-attn 2.8 with its rules: [tokens, heads, dim] in half precision, boundaries in int32."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[0] == k.shape[0] == v.shape[0]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension is contiguous"
    assert q.shape[1] % k.shape[1] == 0 and k.shape[1] == v.shape[1]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and causal and 0 <= dropout_p < 1
    ends = cu_seqlens_q.tolist()
    assert ends == cu_seqlens_k.tolist() and ends[0] == 0 and ends[-1] == q.shape[0]
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(ends))
    groups, scale = q.shape[1] // k.shape[1], softmax_scale or 1 / math.sqrt(q.shape[-1])
    outputs = []
    for start, end in itertools.pairwise(ends):
        query, key, value = (t[start:end].float().transpose(0, 1) for t in (q, k, v))
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        scores = query @ key.transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        hidden = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
        outputs.append((scores.masked_fill(hidden, -math.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("name", MODELS)
def test_documents_reach_the_kernel_with_their_boundaries(name: str) -> None:
    architecture, changes = MODELS[name]
    model = tiny.build(architecture, attn_implementation="eager", **changes).bfloat16().eval()
    choice = choose_attention("auto", type(model), model.config, torch.device("cuda"), torch.bfloat16)
    assert (choice.kernel, choice.padding_free) == ("flash_attention_2", True)
    ids = torch.randint(1, 97, (1, sum(LENGTHS)))
    alone = torch.cat([model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    model.set_attn_implementation(choice.implementation)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    together = model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS, use_cache=False).logits
    assert float((together - alone).float().norm() / alone.float().norm()) < 0.02  # rounding to bfloat16
    together.float().square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "q_proj" in name or "q_b_proj" in name)


@pytest.mark.usefixtures("flash")
def test_models_with_sinks_do_not_take_flash_attn_2() -> None:
    model = tiny.build("gpt_oss")
    choice = choose_attention("auto", type(model), model.config, torch.device("cuda"), torch.bfloat16)
    assert choice.kernel == "eager" and choice.padding_free


@pytest.mark.usefixtures("flash")
def test_a_micro_batch_makes_its_boundaries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 copies the inputs of every block, so that boundaries are recognised by their values."""
    model = tiny.build("llama", attn_implementation="documents_varlen").bfloat16().eval()
    made = []
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *a, f=torch.Tensor.cumsum, **k: made.append(1) or f(*a, **k))
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"document_lengths": tuple(kwargs["document_lengths"])}),
            with_kwargs=True,
        )
    lengths = (5, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model(input_ids=torch.ones(1, 12, dtype=torch.int64), position_ids=positions, document_lengths=lengths)
    assert len(made) == 1
