"""Tests that the model card describes the run and that its code loads the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from opacus.accountants import RDPAccountant
from transformers import AutoTokenizer, LlamaForCausalLM

from dist_ft.config.method import LoraConfig
from dist_ft.config.plan import Plan
from dist_ft.config.privacy import PrivacyConfig
from dist_ft.config.run import RunConfig
from dist_ft.data.store.opened import Split
from dist_ft.export.card import card_of_run, load_lines, load_lines_as_trained, load_lines_bitsandbytes, render_card
from dist_ft.export.probe import compare, probe_model
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.quantize import quantize
from dist_ft.state import Facts
from dist_ft.testing import tiny
from tests.exports import TOKENS, train_a_little
from tests.samples import given

LEDGER = {"rows_read": 1200, "rows_kept": 1199, "tokens": 34567, "supervised_tokens": 8901}


def make_plan(method: dict[str, Any], quantization: str | None = None) -> Plan:
    config = RunConfig.model_validate(
        {
            "run_name": "desk",
            "output_dir": "runs/desk",
            "model": {
                "dtype": "float32",
                "name_or_path": "org/some-model",
                "revision": "abc123",
                "quantization": quantization,
            },
            "task": {"name": "instruction"},
            "data": {"train": ["a|b.jsonl", "c.jsonl"]},
            "method": method,
            "engine": {"name": "zero2"},
            "optim": {"learning_rate": 0.0005},
            "train": {"max_steps": 60},
            "track": {},
            "launch": {"name": "slurm", "workers_per_node": 2, "setup": ["export SECRET=x"]},
        }
    )
    return Plan(
        config=config, nodes=1, workers_per_node=2, world_size=2, accumulation_steps=1, git_sha="f00",
        created="2026-01-01", origins={},
    )  # fmt: skip


def make_card(
    method: dict[str, Any], quantization: str | None = None, model_dir: str = "/somewhere/m", **options: Any
) -> str:
    split = Split("/somewhere/data/0123abcd", "/somewhere/data/0123abcd", LEDGER)
    prepared: Any = SimpleNamespace(model_dir=model_dir, train=split, validation=None, test=None, facts=Facts())
    before, after = {"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.0}, {"step": 60, "eval/loss": 1.23456}
    return render_card(make_plan(method, quantization), prepared, before, after, **options)


def test_it_says_data_method_numbers_and_versions() -> None:
    card = make_card({"name": "lora", "r": 7})
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/some-model" and front["library_name"] == "peft"
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line.startswith("|")
    ]
    assert ["train", "`a\\|b.jsonl`, `c.jsonl`", "1,199 of 1,200", "34,567", "8,901", "`0123abcd`"] in rows
    assert ["validation", "step 0", "step 60"] in rows
    assert ["eval/loss", "3.0000", "1.2346"] in rows and ["eval/exact_match", "0.0000", ""] in rows
    for wanted in (["`method.r`", "7"], ["`optim.learning_rate`", "0.0005"], ["`train.max_steps`", "60"]):
        assert wanted in rows
    assert ["torch", torch.__version__.split("+")[0]] in [[row[0], row[-1].split("+")[0]] for row in rows]
    assert ["git", "f00"] in rows and ["`model.revision`", "abc123"] in rows
    assert "SECRET" not in card


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ({"name": "full"}, {}, "A fully fine-tuned model"),
        ({"name": "lora"}, {"merged": True}, "A LoRA merged adapter"),
        ({"name": "lora"}, {"checkpoint": "step-5"}, "checkpoint `step-5`"),
    ],
)
def test_what_it_is(method: dict[str, Any], options: dict[str, Any], kind: str) -> None:
    assert kind in make_card(method, **options)


def test_it_links_to_the_curves() -> None:
    assert "Curves: [W&B](https://wandb.example/one)." in make_card({"name": "full"}, url="https://wandb.example/one")
    assert "W&B" not in make_card({"name": "full"})


class Rows(Split):
    def open_samples(self) -> Any:
        return range(1000)


@pytest.mark.parametrize(("checkpoint", "steps"), [(None, 45), ("best", 30)])
@pytest.mark.parametrize("asked", [{"noise_multiplier": 0.8}, {"target_epsilon": 3.0, "delta": 1e-5}])
def test_a_private_run_tells_what_it_spent(
    asked: dict[str, float], checkpoint: str | None, steps: int, tmp_path: Path
) -> None:
    plan = make_plan({"name": "full"})
    privacy = PrivacyConfig(**asked, max_grad_norm=0.5)  # type: ignore[arg-type]
    plan = plan.model_copy(update={"config": plan.config.model_copy(update={"privacy": privacy})})
    split = Rows("/somewhere/data/0123abcd", "/somewhere/data/0123abcd", LEDGER)
    prepared: Any = SimpleNamespace(model_dir="/somewhere/m", train=split, validation=None, test=None, facts=Facts())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n{"step": 45, "train/epsilon": 1.0}\n')
    (tmp_path / "checkpoints" / "step-30").mkdir(parents=True)
    (tmp_path / "checkpoints" / "best").symlink_to("step-30")
    card = card_of_run(plan, prepared, tmp_path, checkpoint=checkpoint)
    lines = card.partition("## Privacy")[2].partition("##")[0].splitlines()
    told = dict(line[2:-2].split(" | ") for line in lines if line.startswith("| "))
    noise, batch = float(told["noise multiplier"]), plan.config.train.global_batch_size
    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=batch / 1000)
    delta = asked.get("delta", 1e-4)
    assert told["epsilon"].endswith(f"after {steps} steps") and float(told["delta"]) == delta
    assert float(told["epsilon"].split()[0]) == pytest.approx(accountant.get_epsilon(delta=delta), rel=2e-3)
    assert told["rows expected in a step"].startswith(f"{batch},") and "RDPAccountant" in told["accountant"]
    assert noise == 0.8 or float(told["epsilon"].split()[0]) < 3.0
    assert "## Privacy" not in make_card({"name": "full"})


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantised_base_is_loaded_in_its_bits(scheme: str) -> None:
    method = {"name": "qlora"} if scheme == "nf4" else {"name": "lora"}
    card = make_card(method, quantization=scheme)
    wanted = "load_in_8bit=True" if scheme == "int8" else "bnb_4bit_use_double_quant=True"
    assert wanted in card and f"quantize(base, {scheme!r}" in card and f"| `model.quantization` | {scheme} |" in card
    assert "BitsAndBytesConfig" not in make_card(method, quantization=scheme, merged=True), "a full model"


def test_a_base_whose_files_are_quantized_is_to_be_dequantized(tmp_path: Path) -> None:
    def card(scheme: str, method: str = "lora", **options: Any) -> str:
        (tmp_path / "config.json").write_text(f'{{"quantization_config": {{"quant_method": "{scheme}"}}}}')
        return make_card({"name": method}, model_dir=str(tmp_path), **options)

    assert "FineGrainedFP8Config(dequantize=True)" in card("fp8")
    assert "Mxfp4Config(dequantize=True)" in card("mxfp4")
    assert "`dequantize()`" in card("bitsandbytes")
    assert "are quantized" not in card("fp8", "full") + card("fp8", merged=True) + make_card({"name": "lora"})


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lines_for_a_quantised_base_give_the_trained_model(
    scheme: str, dtype: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model loaded with this package is exact, the model loaded with bitsandbytes is close.

    bitsandbytes has the same NF4 weights but rounds the inputs: to bfloat16 on a CPU, and always to 8 bits with int8
    (LLM.int8).
    """
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    whole = tiny.build("llama", **sizes, initializer_range=0.05).to(getattr(torch, dtype))
    whole.save_pretrained(tmp_path / "base")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype))  # float32 frequencies
    method = Lora(LoraConfig(name="lora", r=4))
    trained: Any = train_a_little(
        method.apply(find_anatomy(quantize(whole, scheme, getattr(torch, dtype), weights=True)))
    )
    method.export(trained, [(name, p) for name, p in trained.named_parameters() if p.requires_grad], tmp_path / "out")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "out")
    probe = probe_model(trained, given(TOKENS))
    monkeypatch.chdir(tmp_path / "out")
    same, near, plain = (
        run_lines(lines)
        for lines in (
            load_lines_as_trained(str(tmp_path / "base"), scheme, dtype),
            load_lines_bitsandbytes(str(tmp_path / "base"), scheme, dtype),
            load_lines(str(tmp_path / "base"), "peft"),
        )
    )
    if scheme == "nf4":
        layer, ours = (model.base_model.model.model.layers[1].mlp.up_proj.base_layer for model in (near, trained))
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, ours.dequantize(weight.dtype))
    far, deviation = (compare(probe, probe_model(model, given(TOKENS))).relative for model in (plain, near))
    assert compare(probe, probe_model(same, given(TOKENS))).relative < 1e-6
    assert deviation < (far / 5 if scheme == "nf4" else 5e-2), (deviation, far)


def run_lines(lines: str) -> Any:
    found: dict[str, Any] = {}
    exec(lines, found)
    assert found["tokenizer"].vocab_size
    return found["model"]
