"""What FSDP2 shards as a unit of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_ft.config.engine import FsdpConfig
from dist_ft.engine import fsdp
from dist_ft.process.place import Place
from dist_ft.state import BuiltModel
from tests import multimodal
from tests.samples import anatomized


class RootReachedError(Exception):
    """The model itself is to be sharded: all units inside it are known."""


def units_of(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are sharded before the model itself, in their order."""
    found: list[nn.Module] = []

    def shard(module: nn.Module, **options: Any) -> None:
        if module is built.model:
            raise RootReachedError
        found.append(module)

    monkeypatch.setattr(fsdp, "fully_shard", shard)
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda kind, shape: None)
    engine = fsdp.Fsdp(
        FsdpConfig(name="fsdp"), device=torch.device("cpu"), place=Place(), dtype=torch.float32, max_grad_norm=1.0
    )
    with pytest.raises(RootReachedError):
        engine.wrap(built)
    return found


@pytest.mark.parametrize("name", ["gemma3", "llava_next", "mllama"])
def test_what_no_text_reaches_is_not_gathered_with_the_embeddings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = anatomized(multimodal.build(name))
    units = units_of(built, monkeypatch)
    idle = [part for part in multimodal.IDLE[name] if part != "model.image_newline"]  # a single parameter
    assert {id(module) for module in units} == {id(m) for m in built.anatomy.parts([*idle, *built.anatomy.blocks])}
    inside = {id(p) for module in units for p in module.parameters()}
    outside = {n for n, p in built.model.named_parameters() if id(p) not in inside}
    assert not any("vision" in n or "projector" in n for n in outside), "gathered for every forward"
