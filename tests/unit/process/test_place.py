"""Each rank takes a GPU of its own, whatever its launcher lets it see. The GPUs are simulated."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from dist_ft.errors import MachineError
from dist_ft.process import comm
from dist_ft.process.place import Place, check_devices, find_device, name_device

See = Callable[..., None]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    """Let this process see some GPUs of a machine, numbered from 0 as CUDA does."""
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)

    def visible(*cards: int, **environ: str) -> None:
        def properties(device: torch.device) -> SimpleNamespace:
            assert device.type == "cuda"
            card = cards[device.index or 0]
            return SimpleNamespace(
                name="H100", uuid=f"GPU-{card}", pci_domain_id=0, pci_bus_id=16 + card, pci_device_id=0
            )

        def set_device(index: int) -> None:
            assert 0 <= index < len(cards)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    return visible


def taken(see: See, visible: list[tuple[int, ...]], environ: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return the host and device of each rank on one machine, from the GPUs that each rank sees."""
    found = []
    for rank, (cards, variables) in enumerate(zip(visible, environ, strict=True)):
        see(*cards, **variables)
        device = find_device(Place(rank, len(visible), rank, "node1"))
        if device.type == "cuda":
            assert os.environ["LOCAL_RANK"] == str(device.index), "DeepSpeed would take another GPU"
        found.append(("node1", name_device(device)))
    return found


@pytest.mark.parametrize(
    ("visible", "environ"),
    [
        ([(0, 1), (0, 1)], [{}, {}]),  # torchrun
        ([(2, 3), (2, 3)], [{"CUDA_VISIBLE_DEVICES": "2,3"}] * 2),
        ([(0,), (1,), (2,)], [{"CUDA_VISIBLE_DEVICES": "0"}] * 3),  # srun --gpus-per-task=1 with cgroups
        ([(0,), (1,), (2,)], [{"CUDA_VISIBLE_DEVICES": str(rank)} for rank in range(3)]),  # and without
        ([(0,), (1,)], [{}, {}]),  # a container for each rank
        ([(0, 1), (2, 3), (4, 5)], [{"CUDA_VISIBLE_DEVICES": "0,1"}] * 3),  # srun --gpus-per-task=2
        ([(), ()], [{}, {}]),
        ([(), ()], [{"CUDA_VISIBLE_DEVICES": "0"}] * 2),
    ],
)
def test_every_rank_has_a_device_of_its_own(see: See, visible: list[tuple[int, ...]], environ: list[dict]) -> None:
    check_devices(taken(see, visible, environ))


@pytest.mark.parametrize(
    ("visible", "environ"),
    [
        ([(0,), (0,)], [{}, {}]),
        ([(0,), (0,)], [{"CUDA_VISIBLE_DEVICES": "0"}] * 2),
        ([(3,), (3,)], [{"CUDA_VISIBLE_DEVICES": "3"}] * 2),
        ([(0,), (0,)], [{"CUDA_VISIBLE_DEVICES": "GPU-0"}] * 2),
        ([(0, 1), (0, 1), (0, 1)], [{}] * 3),
    ],
)
def test_ranks_that_share_a_gpu_are_refused(see: See, visible: list[tuple[int, ...]], environ: list[dict]) -> None:
    rank = len(visible) - 1
    with pytest.raises(MachineError, match=rf"ranks 0 and {rank} on node1: both compute on the same GPU, H100 \(GPU-"):
        check_devices(taken(see, visible, environ))


def test_the_same_name_on_another_host_is_another_gpu() -> None:
    check_devices([("node1", "A (x)"), ("node2", "A (x)")])
    with pytest.raises(MachineError, match="rank 1 on node2: finds no GPU, but other ranks do"):
        check_devices([("node1", "A (x)"), ("node2", "cpu")])


def test_gpus_without_a_uuid_and_parts_of_a_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for uuid, bus in (("GPU-0", 1), ("GPU-0", 2), ("MIG-a", 3), ("MIG-b", 3)):
        of = SimpleNamespace(name="X", uuid=uuid, pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, of=of: of)
        names.add(name_device(torch.device("cuda", 0)))
    assert len(names) == 4


def test_ranks_are_refused_before_they_form_a_group(see: See) -> None:
    """NCCL would fail at the first collective, with a text of its own."""
    see(0)
    store, errors = HashStore(), []

    def join(rank: int) -> None:
        try:
            comm.join(Place(rank, 2, rank, "node1"), store, torch.device("cuda", 0), 5)
        except MachineError as error:
            errors.append(error)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(30)
    assert len(errors) == 2
    assert not torch.distributed.is_initialized()


def test_a_command_that_runs_alone_is_no_worker(see: See) -> None:
    """Accelerate would start a process group where LOCAL_RANK is set."""
    see(0, 1)
    assert find_device(Place()) == torch.device("cuda", 0)
    assert "LOCAL_RANK" not in os.environ
