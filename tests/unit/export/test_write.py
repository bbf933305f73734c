"""Tests that an export reproduces the trained model and that errors during the export are detected and named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.config.method import FullConfig, LoraConfig
from dist_ft.errors import MachineError, TrainingError
from dist_ft.export.probe import Deviation, probe_model
from dist_ft.export.write import publish
from dist_ft.method.full import Full
from dist_ft.method.lora import Lora
from tests.exports import LORAS, TOKENS, Case
from tests.samples import given


def full(folder: Path, out: Path, dtype: str = "float32") -> Case:
    return Case(folder, out, Full(FullConfig(name="full")), dtype)


def lora(folder: Path, out: Path, dtype: str = "float32", **options: Any) -> Case:
    return Case(folder, out, Lora(LoraConfig(name="lora", r=4, lora_alpha=24, **options)), dtype)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run" / "model"


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].float()


def test_a_full_model_is_loaded_by_transformers_alone(tiny_llama: Path, out: Path) -> None:
    case = full(tiny_llama, out)
    deviation = case.export()
    assert deviation is not None and deviation.relative < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(loaded), logits_of(case.model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight, "tied embeddings must stay tied"
    assert loaded.config.use_cache is True and loaded.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not torch.allclose(logits_of(base), logits_of(loaded), atol=1e-2), "the export must contain the training"
    written = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= written
    assert {file.suffix for file in out.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    original, exported = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama, out))
    assert exported.chat_template == original.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert [file.name for file in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("options", LORAS, ids=str)
def test_an_adapter_is_loaded_by_peft_alone(tiny_llama: Path, out: Path, options: dict[str, Any]) -> None:
    case = lora(tiny_llama, out, **options)
    deviation = case.export()
    assert deviation is not None and deviation.relative < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = logits_of(base)
    loaded = peft.PeftModel.from_pretrained(base, out)
    assert torch.allclose(logits_of(loaded), logits_of(case.model), atol=1e-5)
    assert not torch.allclose(before, logits_of(loaded), atol=1e-2)
    stored = load_file(out / "adapter_model.safetensors")
    assert len(stored) == len(list(case.weights())), "only the trained tensors are stored, each once"
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_llama) and settings["lora_alpha"] == 24


def test_an_untied_head_survives(tiny_llama: Path, tmp_path: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "untied")
    case = full(tmp_path / "untied", out)
    assert "lm_head.weight" in dict(case.weights())
    case.export()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out)), logits_of(case.model))


def test_bfloat16_exports_what_it_computed_with(tiny_llama: Path, out: Path) -> None:
    case = full(tiny_llama, out, "bfloat16")
    probe = probe_model(case.model.bfloat16(), given(TOKENS))
    case.model.float()
    case.export(probe=probe)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    wanted = case.model.bfloat16().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def dropped(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    first = next(weights)[0]
    assert first
    yield from weights


def swapped(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    given = dict(weights)
    one, other = (name for name in list(given) if "q_proj" in name and (".lora_A." in name or "lora" not in name))
    given[one], given[other] = given[other], given[one]
    yield from given.items()


def twice(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor
        yield name, tensor


def nan(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, torch.full_like(tensor, float("nan"))


@pytest.mark.parametrize("make", [full, lora])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (dropped, "not passed to the export"),
        (swapped, "logits after loading differ"),
        (twice, "passed to the export twice"),
        (nan, "NaN or inf"),
    ],
)
def test_a_faulty_stream_is_caught(tiny_llama: Path, out: Path, make: Any, fault: Any, said: str) -> None:
    case = make(tiny_llama, out)
    with pytest.raises(TrainingError, match=said):
        case.export(weights=fault(case.weights()))
    assert list(out.parent.iterdir()) == [], "no incomplete export may remain"


def files(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def drop_tensor(state: dict[str, Tensor]) -> str:
    name = sorted(state)[-1]
    del state[name]
    return name


def swap_names(state: dict[str, Tensor]) -> str:
    one, other = sorted(name for name in state if "q_proj" in name and "lora_B" not in name)[:2]
    state[one], state[other] = state[other], state[one]
    return one


def transpose_square(state: dict[str, Tensor]) -> str:
    name = next(n for n, t in sorted(state.items()) if t.ndim == 2 and t.shape[0] == t.shape[1])
    state[name] = state[name].T.contiguous()
    return name


def add_tensor(state: dict[str, Tensor]) -> str:
    name = next(name for name in sorted(state) if "layers.0" in name).replace("layers.0", "layers.9")
    state[name] = torch.ones(3)
    return name


def reshape_tensor(state: dict[str, Tensor]) -> str:
    name = sorted(state)[0]
    state[name] = torch.ones(3)
    return name.rsplit(".", 2)[-2]


@pytest.mark.parametrize("spoil", [drop_tensor, swap_names, transpose_square, add_tensor, reshape_tensor])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_faulty_file_is_caught_and_its_tensor_named(tiny_llama: Path, out: Path, kind: str, spoil: Any) -> None:
    """Simulate a library or disk that stores other tensors than those passed to it."""
    # rank 32 equals the hidden size, so that LoRA's A of q_proj is square
    case = full(tiny_llama, out) if kind == "full" else Case(tiny_llama, out, Lora(LoraConfig(name="lora", r=32)))
    spoilt = ""

    class Faulty(type(case.method)):  # type: ignore[misc]
        def export(self, model: nn.Module, weights: Any, folder: Path) -> None:
            nonlocal spoilt
            super().export(model, weights, folder)
            state = load_file(files(folder))
            spoilt = spoil(state)
            save_file(state, files(folder), metadata={"format": "pt"})

    with pytest.raises(TrainingError) as caught:
        case.export(method=Faulty(case.method.config))
    said = " ".join(str(problem) for problem in caught.value.problems)
    assert spoilt.removesuffix(".weight") in said.replace(".default", "")
    assert not out.exists()


def test_lost_scaling_is_caught_by_the_logits(tiny_llama: Path, out: Path) -> None:
    """All tensors are correct, but adapter_config.json is wrong."""
    case = lora(tiny_llama, out)

    class Faulty(Lora):
        def export(self, model: nn.Module, weights: Any, folder: Path) -> None:
            super().export(model, weights, folder)
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 8}))

    with pytest.raises(TrainingError, match="logits after loading differ"):
        case.export(method=Faulty(case.method.config))


def test_lost_tie_is_caught(tiny_llama: Path, out: Path) -> None:
    case = full(tiny_llama, out)

    class Faulty(Full):
        def export(self, model: nn.Module, weights: Any, folder: Path) -> None:
            super().export(model, weights, folder)
            config = folder / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
            state = load_file(files(folder))
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
            save_file(state, files(folder), metadata={"format": "pt"})

    with pytest.raises(TrainingError, match="not after loading"):
        case.export(method=Faulty(case.method.config))


def test_publishing_replaces_an_older_export_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    fine = Deviation(0.0, 0.0)

    def fill(text: str) -> Any:
        return lambda folder: (folder / text).write_text(text)

    publish(out, fill("one"), lambda folder: fine, needed_bytes=1)
    publish(out, fill("two"), lambda folder: fine, needed_bytes=1)
    assert [file.name for file in out.iterdir()] == ["two"]

    def refuse(folder: Path) -> Deviation:
        raise TrainingError.of("a", "b", "c")

    with pytest.raises(TrainingError):
        publish(out, fill("three"), refuse, needed_bytes=1)
    assert [file.name for file in out.iterdir()] == ["two"] and [file.name for file in tmp_path.iterdir()] == ["model"]
    with pytest.raises(MachineError, match="GiB are free"):
        publish(out, fill("four"), refuse, needed_bytes=10**18)


@pytest.mark.parametrize("build", [full, lora])
def test_each_tensor_ticks_on_each_of_its_ways(build: Any, tiny_llama: Path, out: Path) -> None:
    case, ticks = build(tiny_llama, out), []
    case.export(tick=ticks.append)
    names = [name for name, _ in case.weights()]
    for name in names:
        assert f"exporting {name}" in ticks and f"checking {name} of the exported model" in ticks
    loaded = len(dict(AutoModelForCausalLM.from_pretrained(tiny_llama).named_parameters()))
    assert sum(tick.startswith("Loading weights") for tick in ticks) >= loaded
    assert sum(tick.endswith("of the exported files") for tick in ticks) == len(names)
    assert sum(tick.startswith("syncing") for tick in ticks) == len(list(out.iterdir()))
    assert sum(tick == "probing the model" for tick in ticks) > 10, "each module of the model"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_told_with_the_room_needed(error: Exception, out: Path) -> None:
    def fill(folder: Path) -> None:
        raise error  # the second is safetensors' own on a full tmpfs

    with pytest.raises(MachineError, match=r"the export, which needs 2\.50 GiB") as refused:
        publish(out, fill, lambda folder: Deviation(0.0, 0.0), needed_bytes=5 * 2**29)
    assert refused.value.exit_code == 3 and list(out.parent.iterdir()) == []
