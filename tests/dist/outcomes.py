"""What must be true of runs that differ in engine and world size alone: asserted of every method on every model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter

from dist_ft.checkpoint.reader import SafeReader
from dist_ft.config.method import MethodConfig
from dist_ft.config.model import ModelConfig
from dist_ft.errors import RequestError
from dist_ft.export.merge import main as export_again
from dist_ft.export.opened import open_export
from dist_ft.families import method_of
from dist_ft.model.anatomy import find_anatomy
from dist_ft.state import CAUSAL_LM, Architecture
from tests.dist.cases import metrics_of

PARITY = {"rel": 1e-5}
KINDS = ("model", "exp_avg", "exp_avg_sq")
INPUTS = {"input_ids": torch.arange(3, 30)[None]}


def read_method(settings: Mapping[str, Any]) -> Any:
    """The typed keys of a method."""
    return TypeAdapter(MethodConfig).validate_python(settings)


def curve(run_dir: Path) -> list[float]:
    """Loss and gradient norm of each step."""
    return [value for m in metrics_of(run_dir) for value in (m["train/loss"], m["train/grad_norm"])]


def assert_one_curve(alone: Path, runs: Mapping[Any, Path], steps: int) -> None:
    """The loss falls, and all runs have the curve of the one process."""
    reference = curve(alone)
    losses = reference[::2]
    assert len(losses) == steps and losses[-1] < losses[0] - 1e-3, losses
    for where, run_dir in runs.items():
        assert curve(run_dir) == pytest.approx(reference, **PARITY), where


def assert_only_meant_learn(
    settings: Mapping[str, Any], base: str, runs: Mapping[Any, Path], architecture: Architecture = CAUSAL_LM
) -> None:
    """The parameters that the method means have changed, all others have the base's bits; checkpoints hold the former.

    Args:
        settings: keys of the method.
        base: folder of the model before training.
        runs: as `cases.run_case` left them.
        architecture: with which head the task reads the base.
    """
    config = read_method(settings)
    model = getattr(transformers, architecture.auto_class).from_pretrained(base)
    before = {bits(tensor) for tensor in model.state_dict().values()}
    meant = {n for n, p in method_of(config).apply(find_anatomy(model)).named_parameters() if p.requires_grad}
    for where, run_dir in runs.items():
        trained = torch.load(run_dir / "weights.pt", weights_only=True)
        assert set(trained) == meant, where
        assert not any(bits(tensor) in before for tensor in trained.values()), where
        everything = torch.load(run_dir / "all_weights.pt", weights_only=True)
        frozen = {bits(tensor) for n, tensor in everything.items() if n not in meant}
        assert len(everything) >= len(meant) and frozen <= before, where
        assert bool(frozen) == (config.name != "full"), where
        assert kept_in(run_dir / "checkpoints" / "latest") == {f"{kind}/{n}" for kind in KINDS for n in meant}, where


def assert_exports_agree(
    base: str,
    runs: Mapping[Any, Path],
    architecture: Architecture = CAUSAL_LM,
    inputs: Mapping[str, torch.Tensor] = INPUTS,
) -> None:
    """Loaded again, all exports give the same logits. A run compares its own with the trained model besides."""
    reference = None
    for where, run_dir in runs.items():
        loaded = open_export(run_dir / "model", ModelConfig(name_or_path=base, dtype="float32"), base, architecture)
        with torch.no_grad():
            logits = loaded.eval()(**inputs).logits
        reference = logits if reference is None else reference
        assert torch.allclose(logits, reference, rtol=0, atol=1e-3), where


def assert_merges_where_it_can(settings: Mapping[str, Any], run_dir: Path, out: Path) -> None:
    """A method that can be merged becomes a whole model, as `export_again` compares logits by itself."""
    words = [str(run_dir / "run.yaml"), "merge=true", f"out={out}"]
    if read_method(settings).mergeable:
        export_again(words)
        assert not (out / "adapter_config.json").exists()
    else:
        with pytest.raises(RequestError, match=r"adapter to merge|does not support merging"):
            export_again(words)


def bits(tensor: torch.Tensor) -> bytes:
    """What tells a tensor from every other."""
    return tensor.detach().contiguous().numpy().tobytes()


def kept_in(checkpoint: Path) -> set[str]:
    """The weights and moments that a checkpoint holds."""
    names = SafeReader(checkpoint.resolve()).read_metadata().state_dict_metadata
    return {name for name in names if name.split("/")[0] in KINDS}


def of_one(runs: Mapping[tuple[Any, ...], Path], *first: Any) -> dict[tuple[Any, ...], Path]:
    """The runs whose keys begin so."""
    found: Iterator[tuple[tuple[Any, ...], Path]] = (item for item in runs.items() if item[0][: len(first)] == first)
    return dict(found)
