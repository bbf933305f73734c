"""The parts of a run follow from its configuration."""

from __future__ import annotations

import pytest

from dist_ft.build import build_privacy
from dist_ft.data.order.order import PoissonOrder
from dist_ft.launch.compose import compose


@pytest.mark.parametrize(("quantization", "hooks"), [("nf4", True), ("int8", False)])
def test_rows_go_one_by_one_where_they_would_change_each_other(quantization: str, hooks: bool) -> None:
    words = ["method=qlora", f"model.quantization={quantization}", "privacy.noise_multiplier=1"]
    found = build_privacy(compose(words).config, PoissonOrder(100, 1, 10, 1000), 10)
    assert found is not None and found.hooks == hooks
