"""A merged adapter computes what it does on its base; `dist-ft export` writes that, or a checkpoint, from a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_ft.errors import RequestError
from dist_ft.export.merge import main as export_main
from dist_ft.export.merge import merge
from dist_ft.export.probe import compare, probe_model
from dist_ft.inspect import model as inspection
from tests.exports import LORAS, TOKENS, Case
from tests.runs import move_plan
from tests.samples import given, load_adapted, lora


@pytest.mark.parametrize("options", LORAS, ids=str)
def test_merged_equals_unmerged(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Also covers tied embeddings of the base model that differ after training."""
    case = Case(tiny_llama, tmp_path / "model", lora(r=4, lora_alpha=24, **options))
    before = probe_model(case.model, given(TOKENS))
    merged = merge(case.model)
    assert compare(before, probe_model(merged, given(TOKENS))).relative < 1e-5
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert compare(before, probe_model(loaded, given(TOKENS))).relative < 1e-5


def test_merging_gives_a_model_for_transformers_alone(
    lora_run: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    export_main([str(lora_run / "run.yaml"), "merge=true", f"out={out}"])
    assert "logits differ by" in capsys.readouterr().out
    probe = probe_model(load_adapted(lora_run, tiny_llama), given(range(5, 45)))
    merged = probe_model(AutoModelForCausalLM.from_pretrained(out), given(range(5, 45)))
    torch.testing.assert_close(merged.logits, probe.logits, rtol=1e-4, atol=1e-5)
    assert not (out / "adapter_config.json").exists()
    card = (out / "README.md").read_text()
    assert "3.2500" in card and "1.7500" in card and 'AutoModelForCausalLM.from_pretrained(".")' in card
    with pytest.raises(RequestError, match="already exists"):
        export_main([str(lora_run / "run.yaml"), "merge=true", f"out={out}"])


def test_a_merge_in_bfloat16(full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    export_main([str(lora_run / "run.yaml"), "merge=true", "dtype=bfloat16", f"out={tmp_path / 'm'}"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_a_run_with_a_kernel_for_gpus_is_inspected_and_exported_without_one(lora_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lora_run, tmp_path / "run")
    file = move_plan(lora_run, folder)
    file.write_text(file.read_text().replace("attn_implementation: auto", "attn_implementation: varlen"))
    export_main([str(file), "checkpoint=step-7", f"out={tmp_path / 'm'}"])
    assert (tmp_path / "m" / "adapter_model.safetensors").exists()
    inspection.main([str(file)])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["step-7", "latest"])
def test_a_checkpoint_gives_the_same_model_as_the_run(
    kind: str, name: str, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    run = request.getfixturevalue(f"{kind}_run")
    out = tmp_path / "again"
    export_main([str(run / "run.yaml"), f"checkpoint={name}", f"out={out}"])
    if kind == "lora":
        one, other = (
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
            for folder in (run / "model", out)
        )
    else:
        one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "model", out))
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_a_torn_checkpoint_is_refused(full_run: Path, tmp_path: Path) -> None:
    file = next((full_run / "checkpoints" / "step-7").glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(RequestError, match="does not match the size and SHA-256"):
            export_main([str(full_run / "run.yaml"), "checkpoint=step-7", f"out={tmp_path / 'x'}"])
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge=true"], "no adapter to merge"),
        (["checkpoint=step-9"], "available checkpoints: latest, step-7"),
        (["mrege=true"], "did you mean merge"),
        (["dtype=int8"], "dtype"),
    ],
)
def test_wrong_words_are_named(full_run: Path, words: list[str], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        export_main([str(full_run / "run.yaml"), *words])
    assert said in str(caught.value)


def test_a_run_without_an_export_says_so(full_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no exported model yet"):
        export_main([str(move_plan(full_run, tmp_path))])
