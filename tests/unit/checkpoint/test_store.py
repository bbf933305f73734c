"""Checkpoints are saved atomically and verified before they are loaded."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp_metadata

from dist_ft.checkpoint import store as checkpoint
from dist_ft.checkpoint.files import read_progress
from dist_ft.checkpoint.reader import _MetadataUnpickler
from dist_ft.checkpoint.saver import save as save_checkpoint
from dist_ft.config.train import TrainConfig
from dist_ft.errors import MachineError, RequestError
from dist_ft.process import comm
from dist_ft.process.place import Place
from dist_ft.state import NamedState, Progress


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    place = Place()
    comm.join(place, comm.open_store(place, 10), torch.device("cpu"), 10)
    yield
    comm.leave()


def progress(step: int) -> Progress:
    return Progress(step, 1, "ddp", "abc", 1.5, 2, 0)


def state(value: float) -> NamedState:
    return NamedState({"model/a": torch.full((3, 2), value), "exp_avg/a": torch.full((3, 2), -value)}, updates=7)


def test_round_trip_and_latest(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(2.5), progress(7))
    assert (tmp_path / "latest").resolve() == path and checkpoint.verify(path) is None
    loaded = NamedState({"model/a": torch.zeros(3, 2), "exp_avg/a": torch.zeros(3, 2)}, updates=0)
    checkpoint.load(path, loaded)
    assert torch.equal(loaded.tensors["model/a"], torch.full((3, 2), 2.5))
    assert torch.equal(loaded.tensors["exp_avg/a"], torch.full((3, 2), -2.5))
    assert loaded.updates == 7 and read_progress(path) == progress(7)


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(3))
    (path / "__0_0.distcp").write_bytes(b"torn")
    (path / "left-over").write_bytes(b"x")
    assert save_checkpoint(tmp_path, state(2), progress(3)) == path
    assert checkpoint.verify(path) is None and not (path / "left-over").exists()
    loaded = state(0)
    checkpoint.load(path, loaded)
    assert torch.equal(loaded.tensors["model/a"], torch.full((3, 2), 2.0))
    assert save_checkpoint(tmp_path, state(5), progress(3)) == path  # sound: kept as it is
    checkpoint.load(path, loaded)
    assert torch.equal(loaded.tensors["model/a"], torch.full((3, 2), 2.0))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_flipped_bit_is_found_and_the_older_one_used(tmp_path: Path, name: str) -> None:
    older = save_checkpoint(tmp_path, state(1), progress(1))
    newer = save_checkpoint(tmp_path, state(2), progress(2))
    data = bytearray((newer / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newer / name).write_bytes(data)
    path, torn = checkpoint.newest_sound(tmp_path)
    assert path == older
    assert [problem.where for problem in torn] == [str(newer)] and name in torn[0].rule


def test_an_unfinished_one_is_never_taken(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(3))
    shutil.copytree(path, tmp_path / ".step-4.partial")
    shutil.copytree(path, tmp_path / "step-5")
    (tmp_path / "step-5" / "manifest.json").unlink()
    assert checkpoint.newest_sound(tmp_path)[0] == path


def test_a_step_is_never_written_over(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(3))
    before = (path / "manifest.json").read_bytes()
    assert save_checkpoint(tmp_path, state(9), progress(3)) == path
    assert (path / "manifest.json").read_bytes() == before


def test_leftovers_of_a_killed_save_do_not_mix_in(tmp_path: Path) -> None:
    staging = tmp_path / ".step-3.partial"
    staging.mkdir()
    (staging / "__0_9.distcp").write_bytes(b"of another life")
    path = save_checkpoint(tmp_path, state(1), progress(3))
    assert not staging.exists() and not (path / "__0_9.distcp").exists()


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, state(step), progress(step))
    checkpoint.prune(tmp_path, keep=2, best_step=1)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-4", "step-3", "step-1"]
    checkpoint.prune(tmp_path, keep=None, best_step=None)
    assert len(checkpoint.steps(tmp_path)) == 3


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(MachineError, match="are free"):
        save_checkpoint(tmp_path, state(1), progress(1))
    assert checkpoint.steps(tmp_path) == [] and not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize(
    ("keys", "keeps_best", "count"),
    [
        ({}, False, 3),
        ({}, True, 4),
        ({"save_minutes": None}, False, 1),
        ({"save_steps": 2, "save_total_limit": 5}, False, 6),
    ],
)
def test_room_for_all_that_is_kept_is_needed_at_the_start(
    keys: dict[str, Any], keeps_best: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, train, size = namedtuple("usage", "total used free"), TrainConfig(**keys), 2**30
    held = save_checkpoint(tmp_path, state(1), progress(1))
    own = sum(file.stat().st_size for file in held.iterdir())  # is deleted on the way
    need = round(checkpoint.ROOM_FACTOR * size * count)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - own + 1))
    told = checkpoint.check_rooms(tmp_path, size, train, keeps_best=keeps_best)
    assert told.startswith(f"{count} checkpoint") and f"need {need / 2**30:.2f} GiB" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - own - 1))
    with pytest.raises(MachineError, match=f"need {need / 2**30:.2f} GiB of disk space, but only") as refused:
        checkpoint.check_rooms(tmp_path, size, train, keeps_best=keeps_best)
    assert refused.value.exit_code == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(1))
    other = NamedState({"model/b": torch.zeros(3, 2)}, updates=0)
    with pytest.raises(RequestError, match="its tensors do not match"):
        checkpoint.load(path, other)
    wrong_shape = NamedState({"model/a": torch.zeros(4, 2), "exp_avg/a": torch.zeros(4, 2)}, updates=0)
    with pytest.raises(RequestError, match="cannot be loaded"):
        checkpoint.load(path, wrong_shape)


def test_every_changed_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(1))
    manifest = path / "manifest.json"
    written = manifest.read_bytes()
    dice = random.Random(3)
    for place in range(len(written)):
        other = dice.choice([value for value in range(256) if value != written[place]])
        manifest.write_bytes(written[:place] + bytes([other]) + written[place + 1 :])
        assert checkpoint.verify(path), (place, written[place : place + 1], other)
    manifest.write_bytes(written)
    assert checkpoint.verify(path) is None


def test_a_manifest_of_another_version_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(1))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 7'))
    assert checkpoint.verify(path) == "manifest.json has version 7, and this version of dist-ft reads 1"


@pytest.mark.parametrize("name", ["step-notanumber", "step-", "step-²", "step-4.partial", "step-+4"])
def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, state(1), progress(3))
    (tmp_path / name).mkdir()
    assert checkpoint.newest_sound(tmp_path) == (path, [])
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert (tmp_path / name).is_dir()


def test_a_checkpoint_of_other_settings_is_moved_aside(tmp_path: Path) -> None:
    own = save_checkpoint(tmp_path, state(1), replace(progress(3), settings="mine"))
    old = save_checkpoint(tmp_path, state(1), progress(2))
    save_checkpoint(tmp_path, state(2), replace(progress(9), settings="theirs"))
    path, told = checkpoint.newest_sound(tmp_path, settings="mine")
    assert path == own and "other settings" in told[0].rule and (tmp_path / "stale-1" / "step-9").is_dir()
    shutil.rmtree(own)
    assert checkpoint.newest_sound(tmp_path, settings="mine") == (old, []), "of a version without settings"


def test_a_run_does_not_begin_at_step_0_by_itself_where_no_checkpoint_is_valid(tmp_path: Path) -> None:
    assert checkpoint.newest_sound(tmp_path) == (None, [])
    torn = save_checkpoint(tmp_path, state(1), replace(progress(3), settings="mine"))
    (torn / "__0_0.distcp").write_bytes(b"torn")
    other = save_checkpoint(tmp_path, state(1), replace(progress(2), settings="theirs"))
    with pytest.raises(RequestError) as refused:
        checkpoint.newest_sound(tmp_path, settings="mine")
    assert [problem.where for problem in refused.value.problems] == [str(torn), str(other)]
    assert all("begin at step 0" in problem.way_out for problem in refused.value.problems)
    assert torn.is_dir() and other.is_dir(), "nothing is moved"


def test_a_step_of_another_branch_is_not_taken_for_this_runs(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), replace(progress(8), lineage=(("a", 0),)))
    mine = replace(progress(8), lineage=(("a", 0), ("b", 4)))
    path = save_checkpoint(tmp_path, state(2), mine)
    loaded = state(0)
    checkpoint.load(path, loaded)
    assert torch.equal(loaded.tensors["model/a"], torch.full((3, 2), 2.0))
    assert read_progress(path) == mine
    assert read_progress(tmp_path / "stale-1" / "step-8").lineage == (("a", 0),)
    again = replace(progress(8), lineage=(("a", 0), ("b", 4), ("c", 8)))
    save_checkpoint(tmp_path, state(3), again)  # resumed from this step: the same weights
    assert read_progress(path) == mine


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


class ByGetattr:
    """Object whose pickle looks like that of an enum member in Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple:
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_are_read_as_every_python_writes_them() -> None:
    encoding = dcp_metadata._MEM_FORMAT_ENCODING
    member = encoding.TORCH_CONTIGUOUS_FORMAT
    for written in (member, ByGetattr(encoding, member.name)):
        assert _MetadataUnpickler(io.BytesIO(pickle.dumps(written))).load() is member
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        _MetadataUnpickler(io.BytesIO(pickle.dumps(ByGetattr(dcp_metadata.Metadata, "__init__")))).load()


def test_metadata_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path, state(1), progress(1))
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        checkpoint.load(path, state(0))
    assert not (tmp_path / "pwned").exists()
