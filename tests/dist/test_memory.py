"""Adapters hold gradients and optimizer state for themselves alone; loading holds no more than one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from dist_ft.testing import tiny
from dist_ft.testing.spawn import spawn
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 1, "target_modules": ["q_proj"]},
    "qlora": {"name": "qlora", "r": 1, "target_modules": ["q_proj"]},
    "full": {"name": "full"},
}
WIDTH, LAYERS = 256, 2
ADAPTERS = LAYERS * 2 * WIDTH  # elements of all: A [1, width] and B [width, 1] in each layer
PADDING = 1024 * 4  # bytes: FSDP2 reduces, and ZeRO keeps, what the world size divides
STEPS = 2


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose weights outweigh its adapters a thousand times."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_key_value_heads": 4}
    return tiny.save("llama", tmp_path_factory.mktemp("broad"), **sizes)


def matrix(folder: Path, model: str, data: str, world: int, dtype: str) -> dict[tuple[str, str], dict[str, Any]]:
    cases = {}
    for engine in ENGINES:
        for method, settings in METHODS.items():
            config = token_run(folder / f"{method}-{engine}", model, data, engine, world, 2, False, settings)
            config["model"]["dtype"] = dtype
            config["train"]["max_steps"] = STEPS
            cases[method, engine] = {"config": config}
    return cases


@pytest.mark.parametrize("world, dtype", [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_gradients_and_optimizer_state_are_of_what_learns_alone(
    world: int, dtype: str, broad: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    """What is alive beside the weights has no room for the gradient of one matrix of the base; of `full` it has all."""
    cases = matrix(tmp_path, broad, rows[0], world, dtype)
    cases = {case: given for case, given in cases.items() if case[0] != "full" or dtype == "float32"}
    given = [case | {"train": True} for case in cases.values()]
    ranks = spawn(world, "tests.dist.held:hold_all", given, timeout_s=500)
    smallest_matrix = 2 * WIDTH * WIDTH  # bytes in 16 bits
    whole = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(broad).parameters())
    for (method, engine), *held in zip(cases, *ranks, strict=True):
        where = (method, engine, held)
        elements = whole if method == "full" else ADAPTERS
        copies = world if engine == "ddp" else 1
        assert all(rank["frozen_with_gradient"] == [] for rank in held), where
        moments = sum(rank["optimizer"] for rank in held)
        assert 8 * elements * copies <= moments <= 8 * elements * copies + PADDING, where
        for rank in held:
            assert 0 < rank["gradients"] <= 4 * elements + PADDING, where
            if method == "full":  # so the looking sees what there is: moments in 32 bits, gradients in 16 at least
                assert rank["beside_weights"] > 10 * elements / (world if copies == 1 else 1), where
            else:
                assert rank["frozen"] > 2 * smallest_matrix, where
                assert rank["beside_weights"] < smallest_matrix / 2, where


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A model in 16 bits large enough to stand out from what a process has anyway, and its parameters."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 2048}
    model = tiny.build("llama", **sizes, num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16")
    model.save_pretrained(folder)
    return str(folder), sum(p.numel() for p in model.parameters())


def test_ranks_without_weights_do_not_touch_the_memory_of_the_model(
    large: tuple[str, int], rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    folder, in_16_bits = large[0], 2 * large[1]
    cases = matrix(tmp_path, folder, rows[0], 2, "bfloat16")
    configs = [cases[method, "ddp"]["config"] for method in ("lora", "qlora")]
    reading, waiting = spawn(2, "tests.dist.held:load_all", configs)
    assert reading[1] > 0.25 * in_16_bits, "packed weights would be seen"  # 16-bit ones are read as they are used
    assert max(waiting) < 0.1 * in_16_bits, waiting


def test_building_a_run_never_holds_the_model_of_all_ranks_at_once(
    large: tuple[str, int], rows: tuple[str, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks of the ranks that read nothing: a shard and a tensor, or packed weights and as much to receive them."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is gone from the process at once
    folder, in_16_bits = large[0], 2 * large[1]
    cases = matrix(tmp_path, folder, rows[0], 2, "bfloat16")
    sharded = {case: cases[case] for case in (("lora", "fsdp"), ("lora", "zero3"))}
    packed = {("qlora", engine): cases["qlora", engine] for engine in ENGINES}
    reading, waiting = spawn(
        2, "tests.dist.held:hold_all", [*sharded.values(), *packed.values()], timeout_s=500, fresh=True
    )
    peaks = {case: held["build_peak"] / in_16_bits for case, held in zip([*sharded, *packed], waiting, strict=True)}
    assert all(held["build_peak"] > 0.9 * in_16_bits for held in reading), "this would be seen"
    assert max(peaks[case] for case in sharded) < 1 / 2 + 0.2, peaks  # a tensor of the largest is 0.03
    assert max(peaks[case] for case in packed) < 2 * 0.28 + 0.1, peaks
