"""Quantized folders are read as plain weights, on rank 0 and with a GPU as elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_ft.config.method import LoraConfig
from dist_ft.config.model import ModelConfig
from dist_ft.errors import MachineError, RequestError
from dist_ft.export.opened import open_base
from dist_ft.method.full import Full
from dist_ft.method.lora import Lora
from dist_ft.model.attention.choice import AttentionChoice
from dist_ft.model.load import load_model
from dist_ft.model.quantization.linear import QuantizedLinear
from dist_ft.state import CAUSAL_LM, Anatomy
from tests import stored

EAGER = AttentionChoice("eager", "eager", False, "for a test")
KINDS = ("fp8", "fp8-qwen3_moe", "fp8-deepseek_v3", "mxfp4", "bitsandbytes-4", "bitsandbytes-8")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """By kind, the folder with plain weights and the quantized one."""

    def make(kind: str) -> tuple[str, str]:
        scheme, _, detail = kind.partition("-")
        folder = tmp_path_factory.mktemp(kind)
        if scheme == "fp8":
            return stored.save_fp8(detail or "llama", folder)
        return stored.save_mxfp4(folder) if scheme == "mxfp4" else stored.save_bitsandbytes(folder, int(detail))

    return {kind: make(kind) for kind in KINDS}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU has kernels for FP8, as transformers sees it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("transformers.quantizers.quantizer_mxfp4.is_triton_available", lambda version: True)
    monkeypatch.setattr("transformers.quantizers.quantizer_mxfp4.is_kernels_available", lambda: True)


def load(folder: str, dtype: str = "float32", *, weights: bool = True, **settings: Any) -> Anatomy:
    return load_model(
        ModelConfig(name_or_path=folder, dtype=dtype, **settings), folder, EAGER, CAUSAL_LM, weights=weights
    )


def outline(model: Any) -> list[tuple[Any, ...]]:
    return [(n, type(m).__name__) for n, m in model.named_modules()] + [
        (n, p.shape, p.dtype, p.device.type) for n, p in model.named_parameters()
    ]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_is_read_as_the_plain_one(
    kind: str, dtype: str, folders: dict[str, tuple[str, str]]
) -> None:
    plain, quantized = folders[kind]
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=getattr(torch, dtype), attn_implementation="eager")
    found = load(quantized, dtype).model
    assert outline(found) == outline(expected)
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6 if dtype == "float32" else 1e-2, atol=0, msg=name)
    assert not hasattr(found.config, "quantization_config") and not getattr(found, "is_quantized", False)
    opened = open_base(ModelConfig(name_or_path=quantized, dtype=dtype), quantized)
    assert all(torch.equal(state[name], tensor) for name, tensor in opened.state_dict().items())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_without_weights_build_the_same_modules(kind: str, folders: dict[str, tuple[str, str]]) -> None:
    full, empty = (load(folders[kind][1], "bfloat16", weights=weights).model for weights in (True, False))
    assert outline(full) == outline(empty)
    assert full.config.to_dict() == empty.config.to_dict()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["fp8", "fp8-qwen3_moe", "mxfp4", "bitsandbytes-4"])
@pytest.mark.parametrize("weights", [True, False])
def test_exports_are_plain(kind: str, weights: bool, folders: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """Also of a model that transformers would quantize again because it was read from FP8."""
    method = Full(object())  # type: ignore[arg-type]
    trained = method.apply(load(folders[kind][1]))
    bare = trained if weights else load(folders[kind][1], weights=False).model
    method.export(bare, ((n, p.data) for n, p in trained.named_parameters()), tmp_path / "streamed")
    trained.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "streamed", tmp_path / "saved"):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.state_dict().items())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["fp8", "bitsandbytes-4"])
def test_lora_and_qlora_over_a_quantized_folder(kind: str, folders: dict[str, tuple[str, str]]) -> None:
    for scheme in ("none", "nf4"):
        model = Lora(LoraConfig(name="lora", r=4)).apply(load(folders[kind][1], quantization=scheme))
        bases = {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")}
        assert bases == {torch.nn.Linear if scheme == "none" else QuantizedLinear}
        model(input_ids=torch.arange(1, 9)[None]).logits.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_from_scratch_is_plain(folders: dict[str, tuple[str, str]]) -> None:
    model = load(folders["fp8"][1], from_scratch=True).model
    assert outline(model) == outline(load(folders["fp8"][0]).model)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "something-new", None])
def test_what_cannot_be_dequantized_is_refused(
    method: str | None, folders: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    folder = copy_of(folders["fp8"][1], tmp_path, {"quant_method": method})
    with pytest.raises(
        RequestError, match=rf"stored quantized \({method or 'an unnamed'}[\s\S]*16-bit model[\s\S]*qlora"
    ):
        load(folder)


def test_codes_without_scales_are_never_taken_for_weights(folders: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    folder = copy_of(folders["fp8"][1], tmp_path, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    file = tmp_path / stored.WEIGHTS
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.up_proj\.weight is still stored as torch\.float8_e4m3fn"):
        load(folder)


def test_a_missing_package_is_named(folders: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    folder = copy_of(folders["fp8"][1], tmp_path, {"quant_method": "compressed-tensors"})
    with pytest.raises(RequestError, match="pip install compressed-tensors"):
        load(folder)


def test_a_package_that_is_missing_when_weights_are_read_is_an_error(
    folders: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: False)
    with pytest.raises(MachineError, match="requires accelerate"):
        load(folders["fp8"][1])


def copy_of(folder: str, out: Path, quantization: dict[str, Any]) -> str:
    for file in Path(folder).iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    stored.describe(out, quantization)
    return str(out)
