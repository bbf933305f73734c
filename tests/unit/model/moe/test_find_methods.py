"""Adapters on the experts, and adapters on a quantized base, for every mixture among the causal models of transformers.

`python -m tests.unit.model.moe.test_find_methods` prints the table of mixtures in docs/models.md.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_ft.config.moe import MoeConfig
from dist_ft.errors import DistFtError
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.miniature import build_miniature, draw_weights
from dist_ft.model.moe.policy import apply_policy
from dist_ft.model.quantize import quantize
from dist_ft.state import Anatomy
from tests.samples import lora

from ..library import CAUSAL, DOCUMENT, class_of, published

IDS = torch.arange(1, 25).view(2, 12)
MOST_BLOCKS = 12  # some classes cannot be built with a few layers, and take long
WRONG = "wrong"


class Found(NamedTuple):
    """What holds for a mixture; a reason stands where something is refused."""

    experts: str
    lora: str
    qlora: str


def make(model_type: str) -> PreTrainedModel | None:
    """A miniature with a few layers; None if no model can be built from the configuration."""
    try:
        settings = published(model_type, 4)
        model = build_miniature(class_of(model_type), settings, "eager", torch.float32, keep_top_k=True)
        draw_weights(model, seed=7)
        assert logits_of(model).isfinite().all()
    except Exception:
        return None
    return model


def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def expert_targets(anatomy: Anatomy) -> dict[str, list[str]]:
    """The keys of the method that name the experts' weights, as a user would set them."""
    modules, parameters = [], []
    for mixture in anatomy.mixtures:
        for name in mixture.experts:
            for below, module in anatomy.part(name).named_modules(prefix=name):
                if isinstance(module, nn.Linear):
                    modules.append(below)
                else:
                    own = module.named_parameters(recurse=False)
                    parameters += [f"{below}.{key}" for key, weight in own if weight.ndim > 1]
    return {"target_modules": modules or [anatomy.linears[0]], "target_parameters": parameters}


def steps(model: Any, anatomy: Anatomy, wanted: list[str]) -> str:
    """Train a step; return what is wrong, or an empty text."""
    apply_policy(MoeConfig(), lora().config, anatomy)  # type: ignore[call-arg]
    routers = [mixture.router for mixture in anatomy.mixtures]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    loss = logits_of(model).float().square().mean()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not loss.isfinite() or not all(p.grad is None or p.grad.isfinite().all() for p in trained.values()):
        return "loss or gradients are not finite"
    if any(f"{router}." in name for name in trained for router in routers):
        return "trains a router"
    idle = [name for name in wanted if not any(name in key and p.grad is not None for key, p in trained.items())]
    return f"no gradient for {idle[0]}" if idle else ""


def try_lora(model: PreTrainedModel) -> str:
    """Return `yes`, or why adapters on the experts are refused or wrong."""
    model = copy.deepcopy(model)
    anatomy = find_anatomy(model)
    targets = expert_targets(anatomy)
    try:
        adapted: Any = lora(r=3, lora_alpha=6, **targets).apply(anatomy)
    except DistFtError as error:
        return f"refused: {error.problems[0].rule}"
    wanted = [name.rsplit(".", 1)[0] for name in targets["target_parameters"]]
    if fault := steps(adapted, anatomy, wanted or targets["target_modules"][:1]):
        return f"{WRONG}: {fault}"
    with torch.no_grad():
        expected = logits_of(adapted)
        merged = adapted.merge_and_unload()
        deviation = float((logits_of(merged) - expected).norm() / expected.norm())
    return "yes" if deviation < 1e-4 else f"{WRONG}: merged logits differ by {deviation:.1e}"


def try_qlora(model: PreTrainedModel) -> str:
    """Return `yes`, or why a quantized base is refused or wrong."""
    model = copy.deepcopy(model)
    try:
        quantize(model, "nf4", torch.float32, weights=True)
        anatomy = find_anatomy(model)
        adapted: Any = lora(r=3, lora_alpha=6).apply(anatomy)
    except DistFtError as error:
        return f"refused: {error.problems[0].rule}"
    fault = steps(adapted, anatomy, [])
    return f"{WRONG}: {fault}" if fault else "yes"


def measure(model_type: str) -> Found | None:
    """Measure a model type; None if it is no mixture, or no model can be built from its configuration."""
    model = make(model_type)
    anatomy = None if model is None else find_anatomy(model)
    if model is None or anatomy is None or not anatomy.mixtures or len(anatomy.blocks) > MOST_BLOCKS:
        return None
    why = next((mixture.why_unmeasured for mixture in anatomy.mixtures if mixture.form is None), None)
    return Found("measured" if why is None else f"not measured: {why}", try_lora(model), try_qlora(model))


def measure_all() -> dict[str, Found]:
    """Measure every mixture once; some model types share a class."""
    kinds = {class_of(name): name for name in CAUSAL if "expert" in published(name).to_json_string(use_diff=False)}
    kinds |= {kind: kind.config_class.model_type for kind in kinds if kind.config_class.model_type in CAUSAL}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: measure(name) for name in sorted(kinds.values())}
    return {name: entry for name, entry in found.items() if entry is not None}


def table_of(found: dict[str, Found]) -> str:
    """Render the table of mixtures in docs/models.md."""
    lines = ["| model type | routing | LoRA on the experts | QLoRA |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{name}` | {' | '.join(part.replace('|', chr(92) + '|') for part in entry)} |"
        for name, entry in found.items()
    ]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def mixtures() -> dict[str, Found]:
    """Every mixture among the causal models of the installed transformers."""
    return measure_all()


@pytest.mark.slow
def test_methods_on_experts_are_right_or_refused(mixtures: dict[str, Found]) -> None:
    assert len(mixtures) > 40
    assert not {name: entry for name, entry in mixtures.items() if WRONG in entry.lora + entry.qlora}
    common = "deepseek_v2 deepseek_v3 ernie4_5_moe gemma4_text glm4_moe gpt_oss mixtral olmoe qwen2_moe qwen3_moe"
    assert {mixtures[name] for name in common.split()} == {Found("measured", "yes", "yes")}


@pytest.mark.slow
def test_the_table_is_true(mixtures: dict[str, Found]) -> None:
    """As that of layouts, the document is for the pinned version of transformers."""
    pins = (DOCUMENT.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    if f"transformers=={transformers.__version__} " not in pins:
        pytest.skip(f"transformers {transformers.__version__} is not the version of constraints.txt")
    assert table_of(mixtures) in DOCUMENT.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table_of(measure_all()))
