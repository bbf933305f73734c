"""Devices that only a machine with a GPU has. Skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import re

import pytest
import torch

from dist_ft.launch.machine.devices import find_devices
from dist_ft.model.flops import peak_flops
from dist_ft.process.place import Place, find_device, name_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_this_rank_has_its_device() -> None:
    device = find_device(Place())
    assert device == torch.device("cuda", 0)
    assert re.search(r"\((GPU-)?[0-9a-f]{8}-", name_device(device))
    assert len(find_devices(os.environ)) == torch.cuda.device_count()
    assert peak_flops(device) is None or peak_flops(device) > 1e13
