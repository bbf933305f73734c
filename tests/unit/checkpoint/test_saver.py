"""Checkpoints are written in the background from a copy, one at a time, to the same bytes as without."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.checkpoint import files, store
from dist_ft.checkpoint.saver import Saver, save
from dist_ft.errors import DistFtError, MachineError, TrainingError
from dist_ft.process import comm
from dist_ft.process.place import Place
from dist_ft.state import NamedState, Progress


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    comm.join(Place(), comm.open_store(Place(), 10), torch.device("cpu"), 10)
    yield
    comm.leave()


class Gate:
    """Holds up the writing of every piece until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        write = files._HashedFile._write_piece

        def wait_and_write(file: Any, piece: memoryview) -> None:
            self.reached.set()
            assert self.open.wait(60)
            write(file, piece)

        monkeypatch.setattr(files._HashedFile, "_write_piece", wait_and_write)


def progress(step: int) -> Progress:
    return Progress(step, 1, "ddp", None, None, None, 0)


def state() -> NamedState:
    torch.manual_seed(1)
    weights = torch.randn(300, 200)
    tensors = {"model/a": weights, "model/t": weights.t(), "model/view": weights[3], "exp_avg/a": weights.double()}
    return NamedState({**tensors, "model/half": weights.bfloat16(), "model/one": torch.tensor(3.0)}, updates=5)


def test_the_same_bytes_as_a_save_that_is_waited_for(tmp_path: Path) -> None:
    one = save(tmp_path / "sync", state(), progress(4))
    saver = Saver(tmp_path / "async", asynchronous=True)
    other = saver.save(state(), progress(4))
    saver.settle()
    assert store.verify(other) is None
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {".metadata", "manifest.json"}:  # torch puts a random number into the former
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    first, second = (path / ".metadata" for path in (one, other))
    assert first.stat().st_size - len(str(one)) == second.stat().st_size - len(str(other))


def test_what_is_trained_meanwhile_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, trained = Gate(monkeypatch), Saver(tmp_path, asynchronous=True), state()
    wanted = {name: tensor.clone() for name, tensor in trained.tensors.items()}
    path = saver.save(trained, progress(4))
    assert gate.reached.wait(60) and not path.exists() and not (tmp_path / "latest").exists()
    for tensor in {id(t): t for t in trained.tensors.values()}.values():
        tensor.add_(1)
    gate.open.set()
    saver.settle()
    assert (tmp_path / "latest").resolve() == path
    loaded = state()
    store.load(path, loaded)
    assert all(torch.equal(loaded.tensors[name], wanted[name]) for name in wanted)


def test_a_save_waits_for_the_one_before_and_uses_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, done, trained = Gate(monkeypatch), [], state()
    ticks: list[str] = []
    saver = Saver(tmp_path, asynchronous=True, tick=ticks.append)
    saver.save(trained, progress(1), done.append)
    places = {index: tensor.data_ptr() for index, tensor in saver._copies._held.items()}
    threading.Timer(0.3, gate.open.set).start()
    path = saver.save(trained, progress(2), done.append)
    assert done == [tmp_path / "step-1"], "published before the next save begins"
    assert ticks, "what the thread does is progress while training waits for it"
    assert {index: tensor.data_ptr() for index, tensor in saver._copies._held.items()} == places
    saver.settle()
    assert done == [tmp_path / "step-1", path] and not saver._copies._held


def test_the_first_save_uses_the_memory_that_was_reserved(tmp_path: Path) -> None:
    saver, trained = Saver(tmp_path, asynchronous=True), state()
    saver.reserve(trained)
    saver._copies._wait()
    places = {index: tensor.data_ptr() for index, tensor in saver._copies._held.items()}
    assert len(places) == len(trained.tensors)
    trained.tensors["model/a"].add_(1)
    path = saver.save(trained, progress(1))
    assert {index: tensor.data_ptr() for index, tensor in saver._copies._held.items()} == places
    saver.settle()
    loaded = state()
    store.load(path, loaded)
    assert all(torch.equal(loaded.tensors[name], trained.tensors[name]) for name in trained.tensors)


def test_nothing_is_reserved_for_saves_that_are_waited_for(tmp_path: Path) -> None:
    saver = Saver(tmp_path, asynchronous=False)
    saver.reserve(state())
    saver.settle()
    assert not saver._copies._held


def test_each_piece_that_is_waited_for_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes longer than the watchdog waits is no hang, though all its pieces have the same name."""
    write, ticks = files._HashedFile._write_piece, []

    def slow(file: Any, piece: memoryview) -> None:
        time.sleep(0.1)
        write(file, piece)

    monkeypatch.setattr(files._HashedFile, "_write_piece", slow)
    saver = Saver(tmp_path, asynchronous=True, tick=ticks.append)
    saver.save(state(), progress(1))
    saver.settle()
    assert sum("__0_0.distcp" in tick for tick in ticks) >= 5


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(errno.ENOSPC, MachineError, 3), (errno.EDQUOT, MachineError, 3), (errno.EIO, TrainingError, 4)],
)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_of_the_disk_is_kept_and_raised(
    number: int, kind: type[DistFtError], code: int, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any, piece: memoryview) -> None:
        raise OSError(number, "refused")

    saver = Saver(tmp_path, asynchronous=asynchronous)
    first = saver.save(state(), progress(1))
    saver.settle()
    monkeypatch.setattr(files._HashedFile, "_write_piece", refuse)
    with pytest.raises(kind, match="refused") as raised:
        saver.save(state(), progress(2))
        saver.settle()
    assert raised.value.exit_code == code and saver.failure is not None
    assert store.steps(tmp_path) == [first] and (tmp_path / "latest").resolve() == first
