"""Documents of one row do not see each other, under every kernel and in every architecture that takes documents."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dist_ft.errors import MachineError, RequestError
from dist_ft.model.attention import DOCUMENTS, choose_attention

LENGTHS = (9, 1, 14, 6)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "gemma2-softcap-window": Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "gpt-oss-sinks": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_row_equals_one_document_at_a_time(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    choice = choose_attention(kernel if kernel == "eager" else "auto", type(model), torch.device("cpu"), torch.float32)
    if kernel != choice.kernel:
        assert "sdpa" not in choice.implementation and "nothing else" in choice.reason
    if not choice.padding_free:
        pytest.fail(f"{name} should take documents")
    ids = torch.randint(1, 97, (1, sum(LENGTHS)))
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
        model.set_attn_implementation(choice.implementation)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        together = model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS, use_cache=False).logits
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_gradients_too() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIGS["llama"], attn_implementation="eager")
    ids = torch.randint(1, 97, (1, sum(LENGTHS)))
    sum(model(input_ids=part).logits.square().sum() for part in ids.split(LENGTHS, dim=1)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation(DOCUMENTS["sdpa"])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS).logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_generation_needs_no_documents() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    prompt = torch.randint(1, 97, (1, 7))
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation(DOCUMENTS["sdpa"])
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)


def test_auto_says_why() -> None:
    choice = choose_attention("auto", LlamaForCausalLM, torch.device("cpu"), torch.bfloat16)
    assert (choice.kernel, choice.padding_free) == ("sdpa", True) and "needs a GPU" in choice.reason


def test_flash_attention_by_name_without_a_gpu_is_an_error() -> None:
    with pytest.raises(MachineError, match="needs a GPU"):
        choose_attention("flash_attention_2", LlamaForCausalLM, torch.device("cpu"), torch.bfloat16)


def test_what_the_model_lacks_is_an_error() -> None:
    with pytest.raises(RequestError, match="has no sdpa"):
        choose_attention("sdpa", BloomForCausalLM, torch.device("cpu"), torch.float32)


def test_a_model_with_its_own_attention_gets_padded_rows() -> None:
    choice = choose_attention("auto", BloomForCausalLM, torch.device("cpu"), torch.float32)
    assert not choice.padding_free and choice.implementation == choice.kernel == "eager"
    model = AutoModelForCausalLM.from_config(
        BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=97), attn_implementation=choice.implementation
    )
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 97)
