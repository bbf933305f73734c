"""A run goes on in its folder only with the keys it was started with."""

from __future__ import annotations

from pathlib import Path

from dist_ft.config.plan import make_plan, write_plan
from tests.unit.checks.found import composed, found


def existing_run(*words):
    plan = make_plan(composed(*words).config, nodes=1, workers_per_node=1, origins={})
    write_plan(plan)
    (plan.run_dir / "checkpoints" / "step-5").mkdir(parents=True)
    return plan.run_dir


def test_a_run_goes_on_with_what_may_change():
    existing_run()
    assert found("train.max_steps=9", "train.logging_steps=3", "model.gradient_checkpointing=true") == {}


def test_a_run_of_another_config_is_refused_key_by_key():
    folder = existing_run(f"output_dir={Path.cwd()}/runs/first")
    problems = found(f"output_dir={folder}", "method.r=4", "train.seed=3", "engine=fsdp", "train.save_steps=2")
    assert set(problems) == {"method.r", "train.seed"}
    rule = f"the run in {folder} was started with 16, but the value is now 4"
    assert problems["method.r"].startswith(f"{rule} → set run_name=first-2")


def test_a_run_goes_on_with_the_mixture_it_had():
    sets = ["data=mixture", "data.train=null", "data.mixture.b.train=rows.jsonl", "data.mixture.a.train=rows.jsonl"]
    folder = existing_run(*sets, f"output_dir={Path.cwd()}/runs/first")
    again = [*sets, f"output_dir={folder}"]
    assert found(*again, "data.mixture.a.validation=rows.jsonl") == {}
    assert found(*again[:2], again[3], again[2], again[4]) == {}  # sets are ordered by name
    for words in (
        ["data.mixture.a.weight=2", "data.mixture.b.weight=1"],
        ["data.mixture.a.template={prompt: '{text}', completion: '{text}'}"],
        ["data.mixture.c.train=rows.jsonl"],
    ):
        assert list(found(*again, *words)) == ["data.mixture"], words
    assert list(found(*again, "data.mixture_temperature=3")) == ["data.mixture_temperature"]


def test_a_failed_start_without_a_checkpoint_may_be_mended():
    folder = existing_run()
    (folder / "checkpoints" / "step-5").rmdir()
    assert found("train.seed=3") == {}


def test_starting_anew_over_checkpoints_is_refused():
    existing_run()
    assert "would overwrite" in found("train.resume=never")["train.resume"]
    assert "none/step-3 does not exist" in found("train.resume=none/step-3")["train.resume"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert "is not a run folder" in found(f"output_dir={tmp_path}")["output_dir"]


def test_a_start_that_ended_before_it_wrote_its_plan_may_be_repeated(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert found(f"output_dir={tmp_path / 'run'}") == {}


def test_only_folders_of_checkpoints_count_as_checkpoints():
    folder = existing_run()
    (folder / "checkpoints" / "step-5").rename(folder / "checkpoints" / "step-notanumber")
    assert found("train.resume=never") == {}
