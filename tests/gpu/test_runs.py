"""Whole runs on the GPU: kernels, waits, resuming, saving, folders in FP8, and two ranks that find one GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.testing import tiny
from tests.gpu.runs import ROOT, train
from tests.runs import token_run
from tests.stored import save_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("llama", tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    dice = random.Random(7)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            ids = [dice.randrange(1, tiny.VOCABULARY) for _ in range(dice.randint(5, 40))]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return str(path)


def config_of(folder: Path, model: str, rows: str, name: str = "ddp", **changes: Any) -> dict[str, Any]:
    """A run of six steps in bfloat16; `changes` are added to groups."""
    config = token_run(folder / "run", model, rows, name, 1, 2, False, {"name": "full"})
    config["model"]["dtype"] = "bfloat16"
    config["train"]["max_steps"] = 6
    for group, values in changes.items():
        config[group] |= values
    return config


def losses_of(found: dict[str, Any]) -> list[float]:
    return [metrics["train/loss"] for metrics in found["metrics"]]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_micro_batch_waits_and_losses_are_those_of_a_cpu(
    method: str, chunked: bool, model: str, rows: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"method": {"name": method}, "train": {"max_steps": 6, "chunked_loss": chunked}}
    found = train(config_of(tmp_path / "gpu", model, rows, **changes), tmp_path / "gpu", strict=True)
    assert found["kernel"] in ("documents_varlen", "documents_fa2")
    hidden = train(config_of(tmp_path / "cpu", model, rows, **changes), tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    assert hidden["kernel"] == "documents_sdpa"
    assert losses_of(found) == pytest.approx(losses_of(hidden), rel=0.02)


def test_routers_are_measured_without_a_wait(rows: str, tmp_path: Path) -> None:
    mixture = tiny.save("qwen3_moe", tmp_path / "model")
    found = train(config_of(tmp_path, mixture, rows), tmp_path, strict=True)
    assert found["metrics"][-1]["moe/load_max"] >= 1


def test_flash_attn_2_computes_a_run(model: str, rows: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs the flash-attn package")
    changes = {"model": {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}}
    found = train(config_of(tmp_path / "fa2", model, rows, **changes), tmp_path / "fa2")
    other = train(config_of(tmp_path / "auto", model, rows), tmp_path / "auto")
    assert found["kernel"] == "documents_fa2"
    assert losses_of(found) == pytest.approx(losses_of(other), rel=0.02)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(engine: str, model: str, rows: str, tmp_path: Path) -> None:
    whole = train(config_of(tmp_path / "whole", model, rows, engine), tmp_path / "whole")
    assert all(state.startswith("cuda") for state in whole["devices"]), whole["devices"]
    folder = tmp_path / "parts"
    first = config_of(folder, model, rows, engine, train={"max_steps": 6, "save_steps": 3})
    train(first, folder)
    last = Path(first["output_dir"]) / "checkpoints"
    again = config_of(folder / "again", model, rows, engine, train={"max_steps": 6, "resume": str(last / "step-3")})
    resumed = train(again, folder / "again")
    assert [metrics["step"] for metrics in resumed["metrics"]] == [4, 5, 6]
    assert losses_of(resumed) == pytest.approx(losses_of(whole)[3:], rel=1e-3)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_saving_copies_no_state_to_the_gpu(engine: str, rows: str, tmp_path: Path) -> None:
    large = tiny.save("llama", tmp_path / "model", **SIZES | {"hidden_size": 512, "num_hidden_layers": 8})
    found = train(config_of(tmp_path, large, rows, engine, engine={"offload": "optimizer"}), tmp_path)
    before, most, after = found["saved"]
    assert after <= before + 2**20 and most <= before + 8 * 2**20, "at most a tensor at a time"
    assert all(state.startswith("cpu") for state in found["devices"]), found["devices"]


def test_a_folder_in_fp8_is_dequantized_on_a_gpu(rows: str, tmp_path: Path) -> None:
    plain, packed = save_fp8("llama", tmp_path)
    found = [
        losses_of(train(config_of(tmp_path / name, folder, rows), tmp_path / name))
        for name, folder in (("a", plain), ("b", packed))
    ]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_two_ranks_on_one_gpu_are_refused(model: str, rows: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("needs a machine with one GPU")
    config = config_of(tmp_path, model, rows)
    config["launch"]["workers_per_node"] = 2
    config["train"]["per_device_train_batch_size"] = 2
    file = tmp_path / "case.json"
    file.write_text(json.dumps({"config": config, "strict": False}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.runs", str(file)],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all(worker.returncode for worker in workers)
    assert any("both compute on the same GPU" in text for text in told), told[0][-2000:]
