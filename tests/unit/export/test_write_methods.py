"""Every method's export holds what was trained and nothing else, and is the trained model when loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.config.method import MethodConfig
from dist_ft.errors import TrainingError
from dist_ft.export.merge import merge
from dist_ft.export.opened import open_export
from dist_ft.export.probe import compare, probe_model
from dist_ft.families import method_of
from tests.exports import TOKENS, Case
from tests.samples import given


@pytest.fixture(scope="module")
def biased(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with biases everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


WHOLE: list[dict[str, Any]] = [
    {"name": "freeze", "num_layers": 1},
    {"name": "freeze", "num_layers": 0, "train_head": True, "train_embeddings": True},
    {"name": "bitfit"},
]
ADAPTERS: list[dict[str, Any]] = [
    {"name": "ln_tuning"},
    {"name": "ia3"},
    {"name": "prompt", "num_virtual_tokens": 4},
    {"name": "prefix", "num_virtual_tokens": 4},
    {"name": "prefix", "num_virtual_tokens": 4, "prefix_projection": True},
    {"name": "p_tuning", "num_virtual_tokens": 4},
    {"name": "adapter", "configuration": "houlsby", "reduction_factor": 4},
]
SAVED: dict[str, Any] = {"name": "lora", "r": 4, "modules_to_save": ["embed_tokens"]}  # tied to the head
MERGEABLE = ["ln_tuning", "ia3"]


def case_of(folder: Path, out: Path, settings: dict[str, Any], dtype: str = "float32") -> Case:
    return Case(folder, out, method_of(TypeAdapter(MethodConfig).validate_python(settings)), dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_a_part_that_learned_is_in_a_whole_model(biased: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    case = case_of(biased, tmp_path / "model", settings)
    learned = {name for name, p in case.model.named_parameters() if p.requires_grad}
    deviation = case.export()
    assert deviation is not None and deviation.relative < 1e-6
    base = dict(AutoModelForCausalLM.from_pretrained(biased).named_parameters())
    loaded = dict(AutoModelForCausalLM.from_pretrained(case.out).named_parameters())
    assert {name for name in base if bits(base[name]) != bits(loaded[name])} == learned


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_an_adapter_is_small_and_gives_the_trained_model(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    case = case_of(tiny_llama, tmp_path / "model", settings)
    deviation = case.export()
    assert deviation is not None and deviation.relative < 1e-5
    stored = load_file(case.out / "adapter_model.safetensors")
    if case.method.config.exact:
        assert sorted(bits(t) for t in stored.values()) == sorted(bits(t) for _, t in case.weights())
    else:
        assert list(stored) == ["prompt_embeddings"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = open_export(case.out, case.config, str(tiny_llama))
    width = len(TOKENS)
    before, after = (probe_model(model, given(TOKENS)).logits[-width:] for model in (base, loaded))
    assert not torch.allclose(before, after, atol=1e-2), "the training is in it"


@pytest.mark.parametrize("settings", [s for s in ADAPTERS if "num_virtual_tokens" in s], ids=str)
def test_a_wrong_prompt_is_caught(tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """What is not compared bit by bit, as it is turned into something else, is told by the logits."""
    case = case_of(tiny_llama, tmp_path / "model", settings)

    def negated() -> Any:
        for name, tensor in case.weights():
            yield name, -tensor if name.endswith("embedding.weight") else tensor

    with pytest.raises(TrainingError, match="logits after loading differ"):
        case.export(weights=negated())


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_unmerged(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    case = case_of(tiny_llama, tmp_path / "model", {"name": name})
    before = probe_model(case.model, given(TOKENS))
    merged = merge(case.model)
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert compare(before, probe_model(loaded, given(TOKENS))).relative < 1e-5
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("settings", [*WHOLE[:1], *ADAPTERS, SAVED], ids=str)
def test_bfloat16(tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Trained in float32 beside a base in bfloat16, as engines do that compute in it."""
    case = case_of(tiny_llama, tmp_path / "model", settings, "bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe = probe_model(case.model, given(TOKENS))
    case.export(probe=probe)
