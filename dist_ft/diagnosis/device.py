"""Checks of devices and kernels, with the reason if something is not available."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from .finding import Finding, note, ok, problem
from .versions import installed

AMD_DRIVER = Path("/dev/kfd")


def check_devices() -> Iterator[Finding]:
    """Check CUDA or ROCm, the GPUs and their memory, NCCL and bfloat16."""
    if not torch.distributed.is_available():
        yield problem("torch.distributed", "is not available in this build of torch", "install torch from pytorch.org")
    if not torch.cuda.is_available():
        yield _why_no_gpu()
        capability = torch.backends.cpu.get_cpu_capability()
        yield ok("cpu", f"{torch.get_num_threads()} threads, {capability}")
        fast = capability in ("AVX512", "AMX")
        yield ok("bfloat16", "supported on the CPU" + ("" if fast else ", but slower than float32"))
        return
    yield ok("GPU library", f"{_toolkit()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            way_out = "run nvidia-smi or rocm-smi: the GPU may be in exclusive mode, or may need a reset by its owner"
            yield problem(f"GPU {index}", str(error).splitlines()[0], way_out)
            continue
        name = torch.cuda.get_device_name(index)
        line = f"{name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"
        crowded = free < 0.8 * total
        yield note(f"GPU {index}", line, "another process is using it") if crowded else ok(f"GPU {index}", line)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield ok("bfloat16", "supported in hardware")
    else:
        yield note("bfloat16", "only emulated on this GPU", "set model.dtype=float32")


def check_kernels() -> Iterator[Finding]:
    """Check attention kernels and optional GPU packages."""
    yield _flash_attention()
    if torch.cuda.is_available():
        backends = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
    else:
        backends = {"flash (CPU)": True, "math": True}
    yield ok("torch SDPA", ", ".join(name for name, there in backends.items() if there))
    version = installed("bitsandbytes")
    if version is None or importlib.util.find_spec("bitsandbytes") is None:
        yield note("bitsandbytes", "is not installed; required by method=qlora", "pip install bitsandbytes")
    else:
        yield ok("bitsandbytes", f"{version}; for method=qlora, on GPUs and CPUs")


def _toolkit() -> str | None:
    """Return the library for GPUs with which torch is built; None for a build for CPUs."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def _why_no_gpu() -> Finding:
    drivers = {"CUDA": shutil.which("nvidia-smi") is not None, "ROCm": AMD_DRIVER.exists()}
    built = _toolkit()
    if built is None:
        for wanted, there in drivers.items():
            if there:
                rule = f"torch {torch.__version__} is built for CPUs, but the machine has a GPU"
                return problem("GPU library", rule, f"install torch with {wanted} from pytorch.org")
        return note("GPU library", f"torch {torch.__version__} is built for CPUs; runs use the CPU")
    if drivers[built.split()[0]]:
        way_out = (
            "check nvidia-smi or rocm-smi, and CUDA_VISIBLE_DEVICES: the driver may be too old, or the job may have no"
            " GPU"
        )
        return note("GPU library", f"torch is built with {built}, but no GPU is visible", way_out)
    return note("GPU library", f"torch is built with {built}, but there is no driver; runs use the CPU")


def _flash_attention() -> Finding:
    version = installed("flash-attn") if importlib.util.find_spec("flash_attn") else None
    falls_back = "attention uses the kernels of torch"
    if not torch.cuda.is_available():
        there = f"{version}, but it" if version else "it"
        return note("FlashAttention", f"{there} needs a GPU; {falls_back}")
    if version is None:
        return ok("FlashAttention", "that of torch; the flash-attn package is not installed, and rarely needed")
    if torch.cuda.get_device_capability()[0] < 8:
        return note("FlashAttention", f"{version} needs compute capability 8.0 or later; {falls_back}")
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        way_out = "reinstall it for this torch: pip install --force-reinstall --no-deps flash-attn --no-build-isolation"
        # a problem, since padded rows take it whenever the package is installed
        return problem("FlashAttention", f"{version} cannot be imported: {str(error).splitlines()[0]}", way_out)
    return ok("FlashAttention", f"that of torch, and flash-attn {version} for what torch's lacks")
