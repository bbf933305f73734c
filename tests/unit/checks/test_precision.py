"""model.dtype=auto becomes bfloat16 on GPUs that have it, otherwise the dtype of the checkpoint; a run keeps it."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from dist_ft.config.plan import write_plan
from dist_ft.launch.planning import plan_run
from dist_ft.launch.show import adapted_lines
from dist_ft.testing import tiny
from tests.unit.launch.plans import GPU_SITE, SITE


@pytest.fixture
def planned(tmp_path):
    """Function that plans a run on a model whose config.json has these settings, or on `model`."""

    def plan(*words, site=SITE, model=None, **settings):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        named = [f"model={model or folder}", f"output_dir={tmp_path / 'run'}", "track=off"]
        return plan_run([*named, *words], None, site)[0]

    return plan


@pytest.mark.parametrize(
    ("settings", "site", "expected"),
    [
        ({"dtype": "float32"}, GPU_SITE, "bfloat16"),
        ({"dtype": "float32"}, dataclasses.replace(GPU_SITE, old_gpus=True), "float32"),
        ({"dtype": "bfloat16"}, SITE, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, SITE, "bfloat16"),  # as transformers 4 writes it
        ({"text_config": {"dtype": "bfloat16"}}, SITE, "bfloat16"),
        ({"dtype": "float16"}, SITE, "float32"),
        ({}, SITE, "float32"),
    ],
)
def test_the_dtype_follows_devices_and_checkpoint(planned, settings, site, expected):
    plan = planned(site=site, **settings)
    assert plan.config.model.dtype == expected
    assert any(line.startswith(f"model.dtype → {expected} (") for line in adapted_lines(plan))


def test_a_dtype_that_is_set_stays(planned):
    plan = planned("model.dtype=float32", site=GPU_SITE, dtype="bfloat16")
    assert plan.config.model.dtype == "float32"
    assert not any("dtype" in line for line in adapted_lines(plan))


def test_weights_that_are_initialized_have_no_dtype_of_a_checkpoint(planned):
    assert planned("model.from_scratch=true", "method=full", dtype="bfloat16").config.model.dtype == "float32"


def test_a_job_with_gpus_computes_in_bfloat16_wherever_it_is_submitted(planned):
    job = ["launch=slurm", "launch.workers_per_node=4"]
    assert planned(*job, dtype="float32").config.model.dtype == "bfloat16"
    assert planned(*job, "launch.gpus_per_node=0", dtype="float32").config.model.dtype == "float32"


def test_a_resumed_run_keeps_its_dtype_on_other_devices(planned):
    first = planned(site=GPU_SITE)
    write_plan(first)
    (first.run_dir / "checkpoints" / "step-4").mkdir(parents=True)
    again = planned(site=SITE)
    assert again.config.model.dtype == "bfloat16"


def test_a_model_that_cannot_be_downloaded_is_left_to_the_checks_of_the_model(planned, monkeypatch):
    import huggingface_hub

    def download(name, file, revision=None):
        assert (name, file, revision) == ("org/name", "config.json", None)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert planned(model="org/name").config.model.dtype == "float32"


def test_the_dtype_is_that_with_which_transformers_loads_the_checkpoint(planned, tmp_path):
    """The oracle is transformers' own `dtype="auto"`."""
    saved = tiny.build("llama").to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert planned(model=tmp_path / "saved").config.model.dtype == str(loaded.dtype).removeprefix("torch.")
