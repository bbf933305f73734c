"""Which attention kernel a run takes, and the reason that it prints."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import attention

from dist_ft.errors import MachineError, RequestError
from dist_ft.model.attention import available, kernels
from dist_ft.model.attention.choice import AttentionChoice, choose_attention
from dist_ft.testing import tiny

CPU = torch.device("cpu")


def choose(
    requested: str, model: Any, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16, **keys: Any
) -> AttentionChoice:
    return choose_attention(requested, type(model), model.config, device, dtype, **keys)


def test_auto_says_why() -> None:
    choice = choose("auto", tiny.build("llama"))
    assert (choice.kernel, choice.padding_free) == ("sdpa", True) and "need a GPU" in choice.reason


@pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2", "flash_attention_4", "flex_attention"])
def test_kernels_for_gpus_by_name_without_a_gpu_are_errors(kernel: str) -> None:
    with pytest.raises(MachineError, match="needs a GPU"):
        choose(kernel, tiny.build("llama"))


def test_what_the_model_lacks_is_an_error() -> None:
    with pytest.raises(RequestError, match="has no sdpa"):
        choose("sdpa", tiny.build("bloom"))


def test_a_model_with_its_own_attention_gets_padded_rows() -> None:
    choice = choose("auto", tiny.build("bloom"))
    assert not choice.padding_free and choice.implementation == choice.kernel == "eager"
    model = tiny.build("bloom", attn_implementation=choice.implementation)
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 97)


@pytest.mark.usefixtures("torch_flash")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_gpu_computes_all_documents_in_one_call(name: str, gpu: torch.device) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    choice = choose("auto", tiny.build(name), gpu)
    assert (choice.kernel, choice.implementation, choice.padding_free) == ("varlen", "documents_varlen", True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # its backward returns NaN under masks
    padded = choice.padded("for a test")
    assert padded.kernel == padded.implementation in ("sdpa", "eager") and not padded.padding_free


@pytest.mark.usefixtures("torch_flash", "flash_attn", "flex")
def test_what_varlen_attn_lacks_goes_to_other_kernels(gpu: torch.device) -> None:
    found = {name: choose("auto", tiny.build(name), gpu) for name in ("llama", "gemma2", "gpt_oss")}
    assert {name: choice.kernel for name, choice in found.items()} == {
        "llama": "varlen",
        "gemma2": "flash_attention_2",
        "gpt_oss": "flex_attention",
    }
    assert "varlen has no soft caps" in found["gemma2"].reason
    assert (
        "varlen has no sinks" in found["gpt_oss"].reason and "flash_attention_2 has no sinks" in found["gpt_oss"].reason
    )


@pytest.mark.usefixtures("torch_flash", "flash_attn")
def test_dropout_of_attention_is_kept(gpu: torch.device) -> None:
    choice = choose("auto", tiny.build("llama", attention_dropout=0.1), gpu)
    assert choice.kernel == "flash_attention_2" and "varlen has no attention dropout" in choice.reason


@pytest.mark.usefixtures("torch_flash")
def test_float32_goes_document_by_document_and_says_so(gpu: torch.device) -> None:
    choice = choose("auto", tiny.build("llama"), gpu, torch.float32)
    assert choice.kernel == "sdpa" and "slow" in choice.reason and "varlen needs model.dtype=bfloat16" in choice.reason


def test_a_kernel_that_fails_on_this_gpu_is_not_taken(gpu: torch.device) -> None:
    choice = choose("auto", tiny.build("llama"), gpu)  # nothing implements torch's FlashAttention here
    assert choice.kernel == "sdpa" and "varlen failed on this GPU" in choice.reason
    with pytest.raises(RequestError, match="varlen failed on this GPU"):
        choose("varlen", tiny.build("llama"), gpu)


@pytest.mark.usefixtures("torch_flash")
def test_a_kernel_that_computes_something_else_is_not_taken(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> torch.Tensor:
        form = given[-1]
        return kernels.varlen(*given[:-1], kernels.Form(form.scale, None if form.window is None else form.window + 8))

    monkeypatch.setitem(available.KERNELS, "documents_varlen", wrong)
    choice = choose("auto", tiny.build("llama"), gpu)
    assert choice.kernel == "sdpa" and "varlen computes wrong outputs" in choice.reason


@pytest.mark.usefixtures("torch_flash")
def test_an_old_varlen_attn_is_not_taken(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def old(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> None:
        """The signature of torch 2.10, without is_causal and return_aux."""

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old)
    choice = choose("auto", tiny.build("llama"), gpu)
    assert choice.kernel == "sdpa" and "has no scale, window_size, enable_gqa" in choice.reason


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Install FA3; the list says when torch activates and removes it."""
    module = ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    done: list[str] = []

    def register() -> Any:
        done.append("activated")
        return SimpleNamespace(remove=lambda: done.append("removed"))

    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    yield done
    attention.restore_flash_attention_impl(_raise_warn=False)


@pytest.mark.usefixtures("torch_flash")
def test_flash_attention_3_is_activated_where_it_is_installed(gpu: torch.device, fa3: list[str]) -> None:
    choice = choose("auto", tiny.build("llama"), gpu)
    assert (choice.kernel, choice.implementation, fa3) == ("flash_attention_3", "documents_varlen", ["activated"])
    assert attention.current_flash_attention_impl() == "FA3"
    assert choose("varlen", tiny.build("llama"), gpu).kernel == "varlen"
    assert fa3 == ["activated", "removed"] and attention.current_flash_attention_impl() is None


def test_flash_attention_3_that_fails_is_removed(gpu: torch.device, fa3: list[str]) -> None:
    choice = choose("auto", tiny.build("llama"), gpu)
    assert choice.kernel == "sdpa" and fa3 == ["activated", "removed"]


@pytest.mark.usefixtures("torch_flash")
def test_padded_rows_do_not_take_kernels_of_documents(gpu: torch.device) -> None:
    assert choose("auto", tiny.build("llama"), gpu, causal=False).kernel == "sdpa"
    with pytest.raises(RequestError, match=r"varlen cannot be used: .* no causal language model"):
        choose("varlen", tiny.build("llama"), gpu, causal=False)
