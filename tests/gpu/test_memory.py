"""Memory on the GPU: of losses in chunks, of unpacked weights, and of adapters on fused experts."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.head import attach_head
from dist_ft.model.quantization.packing import pack, unpack
from dist_ft.state import Batch
from dist_ft.task.batches.tokens import sum_losses
from dist_ft.testing import tiny
from tests.samples import lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MIB = 2**20


def peak_of(compute: object) -> int:
    """Return by how many bytes a call exceeds what is allocated before it."""
    assert callable(compute)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("vocabulary", [32_768, 131_072, 262_144])
def test_losses_in_chunks_take_the_memory_of_a_chunk(vocabulary: int) -> None:
    model = tiny.build("llama", vocab_size=vocabulary, max_position_embeddings=8192, attn_implementation="sdpa")
    model = model.cuda().bfloat16().requires_grad_(False)
    model.model.layers.requires_grad_(True)
    ids, positions = torch.randint(0, vocabulary, (4, 2048), device="cuda"), torch.arange(8192, device="cuda")
    batch = Batch({"input_ids": ids}, ids.flatten().roll(-1), positions, positions // 2048, 8192, (0, 1, 2, 3))
    losses, peaks = [], []
    for head in (None, attach_head(model)[0]):

        def step(head: object = head) -> None:
            result = sum_losses(model, batch, head)  # type: ignore[arg-type]
            result.loss.backward()
            losses.append(result.loss.item())

        peaks.append(peak_of(step))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    rest = 200 * MIB  # of the small model itself
    assert peaks[1] < max(256 * MIB, 128 * 12 * vocabulary) + rest
    assert peaks[0] > 8 * 8192 * vocabulary, "all logits at once take at least 8 bytes each"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_large_weight_is_unpacked_in_its_own_memory(scheme: str) -> None:
    shape = (2**15 + 8, 2**13 + 64)  # more than 2^28 elements
    weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    bits, size = pack(weight, scheme, torch.bfloat16), weight.numel() * 2
    del weight
    assert peak_of(lambda: unpack(bits, scheme, shape, torch.bfloat16)) < 2.1 * size


def test_adapters_on_fused_experts_keep_no_merged_weights() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 1024, "num_experts": 32}
    plain = tiny.build("qwen3_moe", **sizes, num_hidden_layers=8)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    method = lora(r=4, target_modules=["q_proj"], target_parameters=parameters)
    model = method.apply(find_anatomy(plain)).cuda().bfloat16()
    experts = sum(p.numel() * 2 for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    ids = torch.randint(0, tiny.VOCABULARY, (1, 64), device="cuda")
    assert experts > 700 * MIB
    assert peak_of(lambda: model(input_ids=ids).logits.float().square().sum().backward()) < experts / 2
