"""What a step cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_ft.model.meter import Meter
from dist_ft.state import StepInfo


def test_throughput_and_the_share_of_waiting_for_data() -> None:
    cost: Any = None  # of a device whose peak is unknown
    found = Meter(torch.device("cpu"), 2, cost).after_step(
        StepInfo(3, 2.0, tokens=100, squared_lengths=0, load_time_s=0.5)
    )
    assert found["perf/tokens_per_second"] == 50 and found["perf/step_time_s"] == 2
    assert found["perf/data_wait_share"] == pytest.approx(0.25) and "perf/mfu" not in found
    assert found["perf/peak_memory_bytes"] > 2**20
