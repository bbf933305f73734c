"""A model folder from a stream: what transformers would write, and never more in memory than a shard and a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_ft.export.account import Account
from dist_ft.method.shards import write_model
from dist_ft.testing import tiny

LIMIT = 8_000  # bytes


def llama() -> Any:
    return tiny.build("llama", **tiny.NARROW, tie_word_embeddings=True)  # its largest tensor is smaller than LIMIT


def joined() -> Any:
    """In its files gate and up, and the attention's four projections, are one tensor each."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**tiny.NARROW | {"num_key_value_heads": 4}))


BUILDERS = {"llama": llama, "joined": joined, **{name: partial(tiny.build, name) for name in tiny.MIXTURES}}


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("limit", [LIMIT, 2**31])
def test_it_holds_what_transformers_would_write(name: str, limit: int, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    model.save_pretrained(tmp_path / "theirs")
    buffers = {n: b for n, b in model.state_dict().items() if n not in dict(model.named_parameters())}
    buffers.pop("lm_head.weight", None)  # tied
    write_model(model, [*model.named_parameters(), *buffers.items()], tmp_path / "ours", limit)
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    files = sorted(name for name in names if name.endswith(".safetensors"))
    rest = {file.name for file in (tmp_path / "theirs").iterdir()} - {"model.safetensors"}
    if limit > LIMIT:
        assert files == ["model.safetensors"] and names == rest | {"model.safetensors"}
    else:
        assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert names == rest | {*files, "model.safetensors.index.json"}
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in model.named_parameters())


def test_no_more_is_held_than_a_shard_and_a_tensor(tmp_path: Path) -> None:
    """Counted whenever the next tensor is asked for; on its way each is copied once, by the account."""
    model = llama()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert sum(sizes) > 3 * LIMIT
    alive: dict[int, int] = {}
    held: list[int] = []

    class Watched(Account):
        def record(self, weights: Any) -> Iterator[tuple[str, Tensor]]:
            for number, (entry, tensor) in enumerate(super().record(weights)):
                alive[number] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, alive.pop, number)
                yield entry, tensor
                del tensor

    def arriving() -> Iterator[tuple[str, Tensor]]:
        for entry, parameter in model.named_parameters():
            held.append(sum(alive.values()))
            yield entry, parameter.detach()

    write_model(model, Watched().record(arriving()), tmp_path / "out", LIMIT)
    assert len(held) == len(sizes) and not alive
    assert max(sizes) < max(held) <= LIMIT + max(sizes)
