"""GPUs are found without torch, as torch would see them; libraries and drivers are simulated."""

import sys
from pathlib import Path

import pynvml
import pytest
import torch

from dist_ft.errors import MachineError
from dist_ft.launch.local import LocalLauncher
from dist_ft.launch.machine import devices
from tests.unit.launch.plans import SITE, plan_of

UUIDS = ("GPU-1a", "GPU-1b", "GPU-2c", "GPU-3d")
VISIBLE = [
    *(None, "", "0", "2,3", "3,0", "2,-1,3", "-1", "0,9,1", "4", "1,1", "x", " 1, 2 ", "1gpu2,2ampere"),
    *("GPU-2c,GPU-1a", "GPU-2", "GPU-1", "GPU-3d,GPU-1,GPU-2c", "GPU-3,GPU-3d", "GPU-9", "GPU-2c,0", "0,GPU-2c"),
]


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(devices, "torch_build", lambda: "cuda")


@pytest.fixture
def hip(monkeypatch, tmp_path):
    """A node with a CPU and three AMD GPUs, of which a job may not use the second."""
    monkeypatch.setattr(devices, "torch_build", lambda: "hip")
    monkeypatch.setattr(devices, "TOPOLOGY", tmp_path)
    for node, (cores, simds, unique) in enumerate([(64, 0, 0), (0, 304, 0xA1), (0, 304, 0xB2), (0, 304, 0xC3)]):
        (tmp_path / str(node)).mkdir()
        lines = f"cpu_cores_count {cores}\nsimd_count {simds}\nunique_id {unique}\ndrm_render_minor 128\n"
        (tmp_path / str(node) / "properties").write_text(lines)
    return tmp_path


def nvml(monkeypatch, uuids=UUIDS, forbidden=(), capabilities=((9, 0),)):
    """Let NVML list GPUs, with the errors that it has for those that a job may not use."""

    def handle(index):
        assert isinstance(index, int)
        if index in forbidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return ("handle", index)

    def uuid(handle):
        name, index = handle
        assert name == "handle"
        return uuids[index]

    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(uuids),
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUUID": uuid,
        "nvmlDeviceGetCudaComputeCapability": lambda device: list(capabilities[device[1] % len(capabilities)]),
    }.items():
        monkeypatch.setattr(pynvml, name, function)


@pytest.mark.parametrize("visible", VISIBLE)
def test_nvidia_gpus_are_those_that_torch_counts(cuda, monkeypatch, visible):
    nvml(monkeypatch)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: len(UUIDS))
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: list(UUIDS))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = devices.find_devices({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert len(found) == torch.cuda._device_count_nvml()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, found)))  # as DeepSpeed's launcher sets it
    assert torch.cuda._device_count_nvml() == len(found)


def test_uuids_are_passed_on_and_never_renumbered(cuda, monkeypatch):
    nvml(monkeypatch)
    assert devices.find_devices({"CUDA_VISIBLE_DEVICES": "GPU-3d,GPU-1a"}) == ("GPU-3d", "GPU-1a")
    assert devices.find_devices({"CUDA_VISIBLE_DEVICES": "3,1"}) == (3, 1)


def test_a_process_sees_one_mig_instance(cuda, monkeypatch):
    nvml(monkeypatch)
    assert devices.find_devices({"CUDA_VISIBLE_DEVICES": "MIG-7f,MIG-8a"}) == ("MIG-7f",)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_worker_for_each_gpu(cuda, monkeypatch, count):
    nvml(monkeypatch, [f"GPU-{index}" for index in range(count)])
    site = type(SITE)("python", "/", 16, devices.find_devices({}))
    words = [f"train.global_batch_size={4 * count}"]
    assert plan_of(LocalLauncher(site), words).world_size == count


def test_gpus_of_other_jobs_do_not_count(cuda, monkeypatch):
    nvml(monkeypatch, forbidden=(0, 2))
    assert devices.find_devices({}) == (0, 1)


def test_no_driver_is_no_gpu(cuda, monkeypatch):
    nvml(monkeypatch)

    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert devices.find_devices({"CUDA_VISIBLE_DEVICES": "0,1"}) == ()


def test_without_the_library_nothing_is_guessed(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MachineError, match="nvidia-ml-py: is not installed"):
        devices.find_devices({})


def test_gpus_that_torch_is_not_built_for_do_not_count(monkeypatch):
    nvml(monkeypatch)
    monkeypatch.setattr(devices, "torch_build", lambda: None)
    assert devices.find_devices({}) == ()


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, (0, 1)),
        ({"HIP_VISIBLE_DEVICES": "1"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "1"}, (1,)),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, (0,)),
        ({"ROCR_VISIBLE_DEVICES": "1"}, (0,)),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000c3,GPU-00000000000000a1", "HIP_VISIBLE_DEVICES": "1,0"}, (1, 0)),
        ({"HIP_VISIBLE_DEVICES": "GPU-00000000000000c3"}, ("GPU-00000000000000c3",)),
        ({"ROCR_VISIBLE_DEVICES": ""}, ()),
    ],
)
def test_amd_gpus_are_found_in_the_topology(hip, environ, found, monkeypatch):
    read = Path.read_text

    def refuse(path, *arguments, **named):
        if path.parent.name == "2":
            raise PermissionError(1, "Operation not permitted", str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert devices.find_devices(environ) == found


def test_no_amd_driver_is_no_gpu(tmp_path):
    assert devices.list_amd(tmp_path / "none") == ()


def test_the_build_of_torch_is_read_without_importing_it(monkeypatch, tmp_path):
    assert devices.torch_build() == ("hip" if torch.version.hip else "cuda" if torch.version.cuda else None)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert devices.torch_build() is None
    for build in ("cuda", "hip"):
        other = "hip" if build == "cuda" else "cuda"
        lines = f"from typing import Optional\n{build}: Optional[str] = '12.8'\n{other}: Optional[str] = None\n"
        (tmp_path / "version.py").write_text(lines)
        spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
        monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert devices.torch_build() == build


def test_a_gpu_without_bfloat16_is_found(cuda, monkeypatch):
    nvml(monkeypatch)
    assert not devices.has_old_gpus()
    nvml(monkeypatch, capabilities=((9, 0), (7, 0)))  # V100
    assert devices.has_old_gpus()
    nvml(monkeypatch, capabilities=((7, 5),), forbidden=(1, 3))  # T4
    assert devices.has_old_gpus()


def test_amd_gpus_compute_in_bfloat16(hip):
    assert not devices.has_old_gpus()
