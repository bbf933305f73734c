"""Tests of `dist-ft doctor`: findings have a remedy, and only problems that prevent every run exit with 3."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dist_ft.diagnosis import device, doctor, machine, network, versions
from dist_ft.diagnosis.finding import Finding, Level, note, ok, problem


def one(findings: Iterator[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_this_machine_can_train_and_the_output_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in shown and "rendezvous" in shown and shown.endswith("notes\n")
    assert shown.replace("\n", "").isprintable()
    assert all(line.split()[0] in ("ok", "note", "0") for line in shown.splitlines())


def test_a_problem_exits_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bad() -> Iterator[Finding]:
        yield ok("a", "fine")
        yield problem("b", "broken", "fix it")
        raise RuntimeError("the check itself")

    monkeypatch.setattr(doctor, "CHECKS", {"things": bad})
    assert doctor.main([]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "problem  things: b: broken → fix it" and "the check itself" in shown[2]
    assert shown[3] == "1 problems, 1 notes"
    assert doctor.main(["x=1"]) == 2


def test_a_terminal_gets_a_table() -> None:
    file = io.StringIO()
    doctor.show({"t": [note("n", "detail", "way out")]}, Console(file=file, force_terminal=True, width=80))
    assert "→ way out" in file.getvalue() and "\x1b[" in file.getvalue()


def test_a_missing_and_an_old_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError
        return "0.1" if name in ("torch", "datasets") else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    asked = ["torch>=2.10", "datasets>=4,<6", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    found = list(versions.check_versions())
    assert one(iter(found), "torch").level is Level.PROBLEM and ">=2.10" in one(iter(found), "torch").remedy
    assert one(iter(found), "datasets").level is Level.NOTE
    assert one(iter(found), "wandb") == note("wandb", "is not installed", "pip install wandb")
    assert set(versions.requirements()) == {"torch", "datasets"}


def test_a_host_name_on_the_loopback_is_named_with_the_interface() -> None:
    outer = [("eth0", "10.0.0.7")]
    finding = network.name_finding("box", ["127.0.1.1"], outer)
    assert finding.level is Level.NOTE and "export GLOO_SOCKET_IFNAME=eth0" in finding.remedy
    assert network.name_finding("box", ["10.0.0.7"], outer).level is Level.OK
    assert network.name_finding("box", ["::1", "127.0.0.1"], []).level is Level.OK
    assert network.name_finding("box", [], outer).remedy.endswith("GLOO_SOCKET_IFNAME=eth0")


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope7")
    assert one(network.check_network(), "GLOO_SOCKET_IFNAME").level is Level.PROBLEM
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert "GLOO_SOCKET_IFNAME" not in [finding.name for finding in network.check_network()]


def test_no_port_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert one(network.check_network(), "rendezvous").level is Level.PROBLEM


def test_disk_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {"free": 100 << 20, "total": 64 << 20}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(**usage))
    found = list(machine.check_disk())
    assert [finding.level for finding in found] == [Level.PROBLEM, Level.PROBLEM, Level.NOTE]
    assert "--ipc=host" in found[2].remedy
    usage |= {"free": 100 << 30, "total": 8 << 30}
    assert {finding.level for finding in machine.check_disk()} == {Level.OK}


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (128, 4096), resource.RLIMIT_MEMLOCK: (64 << 10, 64 << 10)}
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: limits[kind])
    files, locked = machine.check_limits()
    assert (files.level, files.remedy) == (Level.PROBLEM, "ulimit -n 4096")
    assert (locked.level, locked.detail) == (Level.NOTE, "64 KiB")
    for soft, level in ((machine.LEAST_FILES - 1, Level.PROBLEM), (machine.LEAST_FILES, Level.NOTE), (4096, Level.OK)):
        limits[resource.RLIMIT_NOFILE] = (soft, 4096)
        assert next(machine.check_limits()).level is level


def test_missing_programs_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    found = list(machine.check_programs())
    assert {finding.level for finding in found} == {Level.NOTE}
    assert {"ssh", "pdsh", "sbatch"} <= {finding.name for finding in found}


def test_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention is reported for each case, from no GPU to a package that cannot be imported."""
    monkeypatch.setattr(device, "installed", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in one(device.check_kernels(), "FlashAttention").detail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert "that of torch; the flash-attn package is not" in one(device.check_kernels(), "FlashAttention").detail
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "installed", lambda name: "2.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability" in one(device.check_kernels(), "FlashAttention").detail
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with contextlib.suppress(ImportError):
        import flash_attn  # noqa: F401

        pytest.skip("flash-attn is installed here")
    assert one(device.check_kernels(), "FlashAttention").level is Level.PROBLEM


def test_quantized_bases_need_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one(device.check_kernels(), "bitsandbytes").level is Level.OK
    assert "liger-kernel" not in [finding.name for finding in device.check_kernels()]
    monkeypatch.setattr(device, "installed", lambda name: None)
    assert "method=qlora" in one(device.check_kernels(), "bitsandbytes").detail


@pytest.mark.parametrize(
    ("cuda", "hip", "nvidia", "amd", "level", "detail"),
    [
        (None, None, False, False, Level.NOTE, "runs use the CPU"),
        (None, None, True, False, Level.PROBLEM, "but the machine has a GPU"),
        (None, None, False, True, Level.PROBLEM, "but the machine has a GPU"),
        ("12.8", None, True, False, Level.NOTE, "built with CUDA 12.8, but no GPU is visible"),
        ("12.8", None, False, True, Level.NOTE, "built with CUDA 12.8, but there is no driver"),
        (None, "6.4", False, True, Level.NOTE, "built with ROCm 6.4, but no GPU is visible"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cuda: str | None,
    hip: str | None,
    nvidia: bool,
    amd: bool,
    level: Level,
    detail: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(device.shutil, "which", lambda name: name if nvidia else None)
    monkeypatch.setattr(device, "AMD_DRIVER", tmp_path if amd else tmp_path / "none")
    finding = one(device.check_devices(), "GPU library")
    assert finding.level is level
    assert detail in finding.detail
