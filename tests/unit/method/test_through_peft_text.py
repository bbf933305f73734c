"""No method trains a part of a multimodal model that text does not reach, and all that it trains gets a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import TypeAdapter

from dist_ft.config.method import MethodConfig
from dist_ft.errors import RequestError
from dist_ft.families import method_of
from dist_ft.method.through_peft import task_type_of
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.quantization.linear import QuantizedLinear
from dist_ft.model.quantize import quantize
from dist_ft.model.reach import lies_in
from dist_ft.testing import tiny
from tests import multimodal
from tests.samples import trainable_names

METHOD: TypeAdapter[Any] = TypeAdapter(MethodConfig)
CHOICES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "num_layers": 1, "trainable": ["norm"], "train_embeddings": True, "train_head": True},
    "ln_tuning": {"name": "ln_tuning"},
    "ln_tuning-named": {"name": "ln_tuning", "target_modules": ["norm", "input_layernorm"]},
    "ia3": {"name": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "adapter": {"name": "adapter", "reduction_factor": 4},
    "lora": {"name": "lora", "r": 4},
    "lora-named": {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "lora-regex": {"name": "lora", "r": 4, "target_modules": r".*(q_proj|fc2)"},
    "lora-layers": {"name": "lora", "r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lora-saved": {"name": "lora", "r": 4, "modules_to_save": ["k_proj"], "target_modules": ["q_proj"]},
}


def apply(choice: dict[str, Any], model: Any) -> Any:
    config = METHOD.validate_python(choice)
    return method_of(config).apply(find_anatomy(model))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_what_is_trained_gets_a_gradient_from_text(kind: str, name: str) -> None:
    model = multimodal.build(kind)
    idle = find_anatomy(model).idle
    adapted = apply(CHOICES[name], model)
    learn = trainable_names(model)
    assert learn and not any(lies_in(n, idle) for n in learn)
    assert not any(lies_in(n, idle) and ("lora_" in n or "ia3_" in n) for n, _ in model.named_parameters())
    multimodal.run_text(adapted)
    missing = {n for n in learn if model.get_parameter(n).grad is None}
    assert missing == set()


def test_full_trains_everything_else() -> None:
    model = multimodal.build("gemma3")
    idle = find_anatomy(model).idle
    apply({"name": "full"}, model)
    assert trainable_names(model) == {n for n, _ in model.named_parameters() if not lies_in(n, idle)}


def test_lora_adapts_the_layers_of_the_language_model_and_loads_again(tmp_path: Path) -> None:
    adapted = apply({"name": "lora", "r": 4}, multimodal.build("gemma3"))
    names = {n for n, _ in adapted.named_modules() if n.endswith("lora_A.default")}
    assert len(names) == 3 * 7 and all(".language_model.layers." in n for n in names)
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(multimodal.build("gemma3"), tmp_path)
    ids = torch.arange(3, 14)[None]
    assert torch.equal(loaded(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_bitfit_of_a_model_with_biases_in_the_tower_only_is_refused() -> None:
    with pytest.raises(RequestError, match="biases only in parts that text does not reach"):
        apply({"name": "bitfit"}, multimodal.build("gemma3"))


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            {"name": "lora", "target_modules": ["q_proj", "fc1"]},
            r"target_modules.*'fc1'.*no text reaches.*vision_tower",
        ),
        ({"name": "lora", "target_modules": ".*vision_tower.*q_proj"}, r"target_modules.*no text reaches"),
        ({"name": "lora", "modules_to_save": ["multi_modal_projector"]}, r"modules_to_save.*no text reaches"),
        ({"name": "ln_tuning", "target_modules": ["layer_norm1"]}, r"target_modules.*no text reaches"),
        ({"name": "freeze", "num_layers": 0, "trainable": ["vision_tower"]}, r"vision_tower.*no parameter that a text"),
    ],
    ids=str,
)
def test_what_means_only_parts_that_text_does_not_reach_is_refused(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        apply(choice, multimodal.build("gemma3"))


def test_a_quantized_base_packs_the_language_model() -> None:
    model = quantize(multimodal.build("gemma3"), "int8", torch.float32, weights=True)
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 3 * 7 and all(".language_model." in n for n in packed)
    assert find_anatomy(model).idle == multimodal.IDLE["gemma3"]


def test_task_types_of_conditional_generation() -> None:
    assert task_type_of(multimodal.build("gemma3")) == "CAUSAL_LM"
    assert task_type_of(tiny.build("t5")) == "SEQ_2_SEQ_LM"
