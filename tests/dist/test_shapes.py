"""Every method on every shape of model, under each kind of engine: what test_methods.py holds of one decoder.

Engines take turns, so that each method of each shape runs alone, under DDP, FSDP2 and ZeRO-3 on two ranks, and under
some of the others.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from dist_ft.errors import RequestError
from dist_ft.families import method_of
from dist_ft.model.anatomy import find_anatomy
from dist_ft.state import Architecture
from dist_ft.testing.spawn import spawn
from dist_ft.testing.words import WORDS, save_model
from tests.dist.outcomes import (
    INPUTS,
    assert_exports_agree,
    assert_merges_where_it_can,
    assert_one_curve,
    assert_only_meant_learn,
    curve,
    of_one,
    read_method,
)
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

STEPS, LENGTHS, BLOCKS = 3, (40, 5, 38, 7, 35, 10, 30, 14), 4  # two rows make a block of at most 48 tokens
DECODERS = ("qwen3", "gpt2", "opt", "bloom")
SHAPES = (*DECODERS, "bert", "t5")
PACKED = ("qwen3", "gpt2", "opt")  # the others' attention cannot keep documents apart
CASES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "num_layers": 1},
    "bitfit": {"name": "bitfit"},
    "adapter": {"name": "adapter", "configuration": "houlsby", "reduction_factor": 4},
    "lora": {"name": "lora", "r": 4, "loraplus_lr_ratio": 8},
    "dora": {"name": "lora", "r": 2, "use_dora": True, "use_rslora": True},
    "ln_tuning": {"name": "ln_tuning"},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 5},
    "prefix": {"name": "prefix", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 5},
    "scratch": {"name": "full"},  # from a configuration alone
}
VIRTUAL = ("prompt", "prefix", "p_tuning")
RATE = {"ln_tuning": 1e-2, "ia3": 1e-1, "bitfit": 1e-2, "prompt": 3e-1, "prefix": 3e-2, "p_tuning": 3e-2}
REFUSED: dict[tuple[str, str], str] = {
    ("qwen3", "bitfit"): "has no biases, so that bitfit would train nothing",
    ("t5", "bitfit"): "has no biases, so that bitfit would train nothing",
}
ANEW = ("gpt2", "bert")  # as causal and as masked language models
PAIRS = [
    (shape, method)
    for shape, method in itertools.product(SHAPES, CASES)
    if (shape, method) not in REFUSED and (method != "scratch" or shape in ANEW)
]
Key = tuple[str, str, str, int]  # shape, method, engine, world size


def grid() -> list[Key]:
    """Of each pair four runs; every fourth one under ZeRO-1 or 2 too, every twelfth alone under another engine."""
    found: list[Key] = []
    for number, pair in enumerate(PAIRS):
        wheres = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)]
        wheres += [(("zero1", "zero2")[number // 2 % 2], 2)] if number % 8 in (1, 7) else []
        wheres += [(("fsdp", "zero1", "zero2", "zero3")[number // 4 % 4], 1)] if number % 12 == 0 else []
        found += [(*pair, *where) for where in wheres]
    return found


def exported(key: Key) -> bool:
    """It takes longer than to train: one process's, and of two ranks a sharded engine's in turn."""
    sharded = ("fsdp", "zero3")[PAIRS.index(key[:2]) % 2]
    return key[2:] in {("ddp", 1), (sharded, 2)}


def architecture_of(shape: str) -> Architecture:
    kinds = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    return Architecture(kinds.get(shape, "AutoModelForCausalLM"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    wide = {"initializer_range": 0.2}  # what stands before a frozen model of small weights hardly moves its output
    changes = {"bloom": wide, "bert": wide}
    return {
        shape: save_model(
            shape, tmp_path_factory.mktemp(shape), architecture_of(shape).auto_class, **changes.get(shape, {})
        )
        for shape in SHAPES
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very uneven lengths, which make one global batch: every step has them all, so that any loss falls."""
    dice = random.Random(7)
    folder = tmp_path_factory.mktemp("rows")
    texts = [dice.choices(WORDS[:12], k=length) for length in LENGTHS]
    shapes = {
        "texts": lambda words: {"text": " ".join(words)},
        "pairs": lambda words: {"source": " ".join(words), "target": " ".join(words[1:3])},
        "answers": lambda words: {"prompt": " ".join(words[:-2]), "completion": " " + " ".join(words[-2:])},
    }
    for name, shape in shapes.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(shape(words)) + "\n" for words in texts))
    return folder


def config_of(folder: Path, key: Key, base: str, data: Path) -> dict[str, Any]:
    """Decoders learn texts, or (two methods of three) answers to prompts; packed where model and method can."""
    shape, method, engine, world = key
    packing = shape in PACKED and method not in VIRTUAL
    config = token_run(folder, base, "", engine, world, 2, packing, CASES[method])
    kind = "pairs" if shape == "t5" else "texts"
    if shape in DECODERS and list(CASES).index(method) % 3:
        kind = "answers"
    elif shape in DECODERS:
        config["task"]["name"] = "causal_lm"
    else:
        config["task"] = {"name": "seq2seq" if kind == "pairs" else "masked_lm", "max_length": 48}
        config["task"] |= {} if kind == "pairs" else {"mlm_probability": 0.9}
    config["data"] |= {"train": str(data / f"{kind}.jsonl"), "format": "auto"}
    if packing or kind == "texts" and shape == "bert":
        config["train"] |= {"global_batch_size": BLOCKS, "per_device_train_batch_size": BLOCKS // world // 2}
    config["optim"]["learning_rate"] = RATE.get(method, 3e-3)
    config["train"]["max_steps"] = STEPS
    if method == "scratch":
        config["model"]["from_scratch"] = True
        config["train"]["seed"] = 1  # other weights than those of the base
    return config


@pytest.fixture(scope="module")
def runs(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Path]:
    folders: dict[Key, Path] = {}
    for world in (1, 2):
        top = tmp_path_factory.mktemp(f"world-{world}")
        cases = []
        for key in grid():
            if key[-1] == world:
                folders[key] = top / "-".join(map(str, key))
                config = config_of(folders[key], key, bases[key[0]], data)
                cases.append({"config": config, "export": exported(key)})
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=800)
    return folders


@pytest.mark.parametrize(("shape", "method"), PAIRS)
def test_the_curve_is_that_of_one_process_and_falls(shape: str, method: str, runs: dict[Key, Path]) -> None:
    assert_one_curve(runs[shape, method, "ddp", 1], of_one(runs, shape, method), STEPS)


@pytest.mark.parametrize(("shape", "method"), PAIRS)
def test_only_what_is_meant_changes_is_kept_and_comes_back(
    shape: str, method: str, runs: dict[Key, Path], bases: dict[str, str], tmp_path: Path
) -> None:
    own, architecture = of_one(runs, shape, method), architecture_of(shape)
    assert_only_meant_learn(CASES[method], bases[shape], own, architecture)
    inputs = INPUTS | ({"decoder_input_ids": INPUTS["input_ids"]} if shape == "t5" else {})
    of_exports = {key: run_dir for key, run_dir in own.items() if exported(key)}
    assert_exports_agree(bases[shape], of_exports, architecture, inputs)
    assert_merges_where_it_can(CASES[method], runs[shape, method, "ddp", 1], tmp_path / "merged")


@pytest.mark.parametrize("shape", ANEW)
def test_what_begins_anew_is_not_the_base(shape: str, runs: dict[Key, Path]) -> None:
    """All ranks have the same start nevertheless, as their curve is that of one process."""
    assert curve(runs[shape, "scratch", "ddp", 1])[0] != pytest.approx(
        curve(runs[shape, "full", "ddp", 1])[0], rel=1e-3
    )


@pytest.mark.parametrize(("shape", "method"), REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(shape: str, method: str, bases: dict[str, str]) -> None:
    model = getattr(transformers, architecture_of(shape).auto_class).from_pretrained(bases[shape])
    settings = read_method(CASES[method])
    with pytest.raises(RequestError, match=REFUSED[shape, method]):
        method_of(settings).apply(find_anatomy(model))
