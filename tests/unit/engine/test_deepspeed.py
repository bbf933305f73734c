"""What DeepSpeed asks a GPU for; the GPU is simulated."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest
import torch
from deepspeed.accelerator import cuda_accelerator

from dist_ft.engine.deepspeed import ignore_nvml


@pytest.mark.parametrize("visible", ["GPU-1a", "MIG-7f", "5", None])
def test_free_memory_is_found_however_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    def look_up(index: int) -> None:
        assert isinstance(index, int)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)  # the job has one GPU, which NVML calls 0

    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", look_up)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    monkeypatch.setattr(cuda_accelerator, "pynvml", None)
    accelerator = cuda_accelerator.CUDA_Accelerator()
    assert cuda_accelerator.pynvml is not None
    ignore_nvml()
    assert accelerator.available_memory() == 50
