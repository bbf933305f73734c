"""GPUs of this machine that workers can use, found without torch, which takes 2.4 s to import.

NVIDIA GPUs are listed by NVML, AMD GPUs by the topology that their driver publishes (`/sys/class/kfd`). Only GPUs for
which torch is built count, because workers use the CPU otherwise.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import MachineError, RequestError

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
BFLOAT16_SINCE = (8, 0)  # compute capability


def find_devices(environ: Mapping[str, str]) -> tuple[int | str, ...]:
    """Return the GPUs that a worker sees, as CUDA_VISIBLE_DEVICES names them: by ordinal or by UUID.

    Raises:
        MachineError: If torch is built with CUDA, but the package that lists GPUs is not installed.
    """
    build = torch_build()
    if build == "cuda":
        return choose_visible(environ.get("CUDA_VISIBLE_DEVICES"), list_nvidia())
    if build == "hip":
        cards = list_amd(TOPOLOGY)
        # applied first; HIP numbers the GPUs that are left anew
        cards = tuple(cards[place] for place in _places(environ.get("ROCR_VISIBLE_DEVICES"), cards))
        return choose_visible(environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES")), cards)
    return ()


def choose_visible(visible: str | None, cards: tuple[str, ...]) -> tuple[int | str, ...]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES makes visible.

    As the drivers and torch read it: the first entry that names no GPU hides all that follow, an entry that repeats
    another hides all, and of MIG instances a process sees only one (NVIDIA Multi-Instance GPU User Guide).

    Args:
        visible: The value; None makes all GPUs visible.
        cards: UUIDs of the GPUs of the machine.
    """
    if visible is not None and visible.startswith("MIG-"):
        return (visible.partition(",")[0].strip(),) if cards else ()
    return tuple(_places(visible, cards).values())


def _places(visible: str | None, cards: tuple[str, ...]) -> dict[int, int | str]:
    """Return the places in `cards` that are visible, each with the entry that names it."""
    if visible is None:
        return {place: place for place in range(len(cards))}
    found: dict[int, int | str] = {}
    by_name = visible.startswith("GPU-")  # the first entry decides for all
    for word in map(str.strip, visible.split(",")):
        number = re.match(r"\d+", word)  # what follows the number is ignored
        if by_name:
            places = [place for place, uuid in enumerate(cards) if word.startswith("GPU-") and uuid.startswith(word)]
        else:
            places = [int(number[0])] if number and int(number[0]) < len(cards) else []
        if len(places) != 1:
            break
        if places[0] in found:
            return {}
        found[places[0]] = int(number[0]) if number else word
    return found


def choose_for_slots(devices: Sequence[int | str], slots: int) -> list[dict[str, str]]:
    """Share GPUs out to runs at the same time; return the environment variables of each.

    Args:
        devices: GPUs as `find_devices` returns them; without any, all runs share the CPU.
        slots: Number of runs; GPUs that cannot be divided evenly are left out.

    Raises:
        RequestError: If there are fewer GPUs than runs.
    """
    if slots == 1 or not devices:
        return [{} for _ in range(slots)]
    share = len(devices) // slots
    if not share:
        rule = f"this machine has {len(devices)} GPUs, fewer than runs at the same time"
        raise RequestError.of(f"jobs={slots}", rule, f"set jobs={len(devices)} or fewer")
    name = "HIP_VISIBLE_DEVICES" if torch_build() == "hip" else "CUDA_VISIBLE_DEVICES"
    parts = [devices[share * i : share * (i + 1)] for i in range(slots)]
    return [{name: ",".join(map(str, part))} for part in parts]


def torch_build() -> str | None:
    """Return `cuda` or `hip`, for which the installed torch is built; None if it is built for CPUs or not installed."""
    spec = importlib.util.find_spec("torch")  # finds a package without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    version = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))
    return next((name for name in ("hip", "cuda") if version.get(name)), None)


def has_old_gpus() -> bool:
    """Return whether an NVIDIA GPU of this machine is older than Ampere, the first generation with bfloat16."""
    return torch_build() == "cuda" and len(list_nvidia()) != len(list_nvidia(BFLOAT16_SINCE))


def list_nvidia(capability: tuple[int, int] = (0, 0)) -> tuple[str, ...]:
    """Return the UUIDs of the NVIDIA GPUs that this process may use; none without a working driver.

    Args:
        capability: The least compute capability of the GPUs to list.

    Raises:
        MachineError: If nvidia-ml-py is not installed.
    """
    try:
        import pynvml
    except ImportError as error:
        rule = "is not installed, so the GPUs of this machine cannot be counted"
        raise MachineError.of("nvidia-ml-py", rule, "run `pip install nvidia-ml-py`") from error
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:  # no library, no driver, or one that does not match the other; torch sees no GPU either
        return ()
    found = []
    for index in range(count):
        try:
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            if tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device)) >= capability:
                found.append(pynvml.nvmlDeviceGetUUID(device))
        except pynvml.NVMLError:  # the count includes GPUs that a container or a job may not use
            continue
    pynvml.nvmlShutdown()
    return tuple(found)


def list_amd(topology: Path) -> tuple[str, ...]:
    """Return the UUIDs of the AMD GPUs that this process may use, as `rocminfo` shows them.

    Args:
        topology: Folder with one folder for each CPU and GPU, whose file `properties` has lines of `NAME NUMBER`.
    """
    found = []
    for node in sorted(topology.glob("[0-9]*"), key=lambda node: int(node.name)):
        try:
            lines = (node / "properties").read_text().splitlines()
        except OSError:  # the driver refuses to describe GPUs that a container or a job may not use
            continue
        properties = dict(line.split(maxsplit=1) for line in lines if " " in line)
        if int(properties.get("simd_count", 0)):  # a node without is a CPU
            found.append(f"GPU-{int(properties.get('unique_id', 0)):016x}")
    return tuple(found)
