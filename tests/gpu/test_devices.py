"""What only a GPU can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch
from transformers import LlamaForCausalLM

from dist_ft.launch.machine.devices import find_devices
from dist_ft.model.attention.choice import choose_attention
from dist_ft.model.flops import peak_flops
from dist_ft.process.place import Place, find_device, name_device
from dist_ft.testing import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTHS = (33, 7, 120, 64)


def small() -> LlamaForCausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "vocab_size": 512}
    return tiny.build("llama", **sizes, max_position_embeddings=512).cuda().bfloat16().eval()


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_attention_2"])
@torch.no_grad()
def test_documents_stay_apart(kernel: str) -> None:
    if kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs the flash-attn package")
    model = small()
    ids = torch.randint(0, 512, (1, sum(LENGTHS)), device="cuda")
    apart = torch.cat([model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    choice = choose_attention(kernel, type(model), model.config, torch.device("cuda"), torch.bfloat16)
    model.set_attn_implementation(choice.implementation)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    together = model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS, use_cache=False).logits
    assert (together - apart).norm() / apart.norm() < 2e-2


def test_auto_takes_the_best_there_is() -> None:
    model = small()
    choice = choose_attention("auto", type(model), model.config, torch.device("cuda"), torch.bfloat16)
    has_package = importlib.util.find_spec("flash_attn") is not None
    assert choice.kernel == ("flash_attention_2" if has_package else "sdpa")


def test_this_rank_has_its_device() -> None:
    device = find_device(Place())
    assert device == torch.device("cuda", 0)
    assert re.search(r"\((GPU-)?[0-9a-f]{8}-", name_device(device))
    assert len(find_devices(os.environ)) == torch.cuda.device_count()
    assert peak_flops(device) is None or peak_flops(device) > 1e13
