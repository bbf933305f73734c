"""Every method on every engine: the single process's curve, the intended parameters, a small checkpoint, an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.export.merge import main as export_again
from dist_ft.testing import tiny
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.outcomes import (
    assert_exports_agree,
    assert_merges_where_it_can,
    assert_one_curve,
    assert_only_meant_learn,
    curve,
    of_one,
)
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "freeze": {"name": "freeze", "num_layers": 1},
    "features": {"name": "freeze", "num_layers": 0, "train_head": True, "train_embeddings": True},
    "bitfit": {"name": "bitfit"},
    "adapter": {"name": "adapter", "configuration": "houlsby", "reduction_factor": 4},
    "lora": {"name": "lora", "r": 4, "loraplus_lr_ratio": 8, "rank_pattern": {"q_proj": 2}, "layers_to_transform": [1]},
    "saved": {"name": "lora", "r": 4, "init_lora_weights": "orthogonal", "modules_to_save": ["embed_tokens"]},
    "ln_tuning": {"name": "ln_tuning"},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 5},
    "prefix": {"name": "prefix", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 5},
}
WHOLE_AND_CASES = {"full": {"name": "full"}, **CASES}
RATE = {"ln_tuning": 3e-2, "ia3": 1e-1, "bitfit": 1e-2, "prompt": 3e-1, "prefix": 3e-2, "p_tuning": 1e-2}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with biases and tied embeddings; its weights are large, so that small methods move the loss."""
    folder = tmp_path_factory.mktemp("biased")
    biases = {"attention_bias": True, "mlp_bias": True}
    return tiny.save("llama", folder, **biases, tie_word_embeddings=True, initializer_range=0.1)


@pytest.fixture(scope="module")
def runs(biased: str, rows: tuple[str, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    """One group of workers for each world size runs all methods on all engines."""
    folders: dict[tuple, Path] = {}
    for world in (1, 2):
        top = tmp_path_factory.mktemp(f"world-{world}")
        cases = []
        for method, settings in CASES.items():
            for engine in ENGINES:
                folder = top / f"{method}-{engine}"
                config = token_run(folder, biased, rows[0], engine, world, 2, False, settings)
                config["optim"]["learning_rate"] = RATE.get(method, 3e-3)
                config["train"]["max_steps"] = STEPS
                cases.append({"config": config, "export": exports(engine, world)})
                folders[method, engine, world] = folder
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=600)
    return folders


def exports(engine: str, world: int) -> bool:
    """Alone the engines hold the same, so one of them is exported there; it takes longer than to train."""
    return world == 2 or engine == "ddp"


@pytest.mark.parametrize("method", CASES)
def test_the_curve_is_that_of_one_process_and_falls(method: str, runs: dict[tuple, Path]) -> None:
    assert_one_curve(runs[method, "ddp", 1], of_one(runs, method), STEPS)


@pytest.mark.parametrize("method", CASES)
def test_only_what_is_meant_changes_is_kept_and_comes_back(method: str, runs: dict[tuple, Path], biased: str) -> None:
    own = of_one(runs, method)
    assert_only_meant_learn(CASES[method], biased, own)
    assert_exports_agree(biased, {key: run_dir for key, run_dir in own.items() if exports(*key[1:])})


@pytest.mark.parametrize("method", CASES)
def test_a_run_is_exported_again_from_its_checkpoint_and_merged_where_it_can_be(
    method: str, runs: dict[tuple, Path], tmp_path: Path
) -> None:
    """`export_again` loads what it wrote and compares logits by itself; see also that nothing is left out."""
    run_dir = runs[method, "zero3", 2]
    for words in (["checkpoint=latest"], []):
        out = tmp_path / f"again-{len(words)}"
        export_again([str(run_dir / "run.yaml"), *words, f"out={out}"])
        first, again = (sorted(file.name for file in folder.iterdir()) for folder in (run_dir / "model", out))
        assert first == again
    assert_merges_where_it_can(CASES[method], run_dir, tmp_path / "merged")


@pytest.fixture(scope="module")
def halves(biased: str, rows: tuple[str, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    """In bfloat16: every engine on two ranks, and one process; that one in float32 too."""
    top = tmp_path_factory.mktemp("halves")
    folders: dict[tuple, Path] = {}
    for world in (1, 2):
        cases = []
        for method, settings in WHOLE_AND_CASES.items():
            kinds = [("ddp", "float32"), ("ddp", "bfloat16")] if world == 1 else [(e, "bfloat16") for e in ENGINES]
            for engine, dtype in kinds:
                folder = top / f"{method}-{engine}-{world}-{dtype}"
                config = token_run(folder, biased, rows[0], engine, world, 2, False, settings)
                config["optim"]["learning_rate"] = RATE.get(method, 3e-3)
                config["train"]["max_steps"] = STEPS
                config["model"]["dtype"] = dtype
                cases.append({"config": config})
                folders[method, engine, world, dtype] = folder
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=600)
    return folders


@pytest.mark.parametrize("method", WHOLE_AND_CASES)
def test_in_bfloat16_the_curve_is_that_of_one_process_up_to_rounding(method: str, halves: dict[tuple, Path]) -> None:
    """Two curves that rounding alone takes from the float32 one are at most twice as far from each other.

    How far is measured, on the single process. It may have been lucky, so a rounding comes on top: of a gradient norm
    bfloat16's spacing, 2 ** -7; of a loss half of it, averaged over the step's n tokens, whose errors are independent.
    With the first step's weights, which no rounding has moved yet, the norms must agree to the spacing.
    """
    single, exact = halves[method, "ddp", 1, "bfloat16"], halves[method, "ddp", 1, "float32"]
    assert curve(single) != curve(exact), "bfloat16 was not used"
    tokens = min(line["train/supervised_tokens"] for line in metrics_of(single))
    for name, rounding in {"train/loss": 2**-8 / tokens**0.5, "train/grad_norm": 2**-7}.items():
        reference = values(single, name)
        tolerance = 2 * distance(reference, values(exact, name)) + rounding
        for engine in ENGINES:
            got = values(halves[method, engine, 2, "bfloat16"], name)
            assert distance(got, reference) < tolerance, (engine, name, got, reference)
            assert distance(got[:1], reference[:1]) < 2**-7, (engine, name, got, reference)


def values(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in metrics_of(run_dir)]


def distance(curve: list[float], reference: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(curve, reference, strict=True))
