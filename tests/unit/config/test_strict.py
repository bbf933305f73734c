"""Unknown, missing and impossible keys are named with what was meant."""

from __future__ import annotations

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import compose


def test_keys_of_a_set_are_as_strict_as_others():
    with pytest.raises(RequestError) as caught:
        compose(["data=mixture", "data.mixture.a.wieght=2", "data.mixture.b.train=x", "data.mixture.b.weight=-1"])
    problems = {p.where.split(" ")[0]: f"{p.rule} → {p.way_out}" for p in caught.value.problems}
    assert set(problems) == {"data.mixture.a.wieght", "data.mixture.a.train", "data.mixture.b.weight"}
    assert "did you mean data.mixture.a.weight?" in problems["data.mixture.a.wieght"]
    assert "is required" in problems["data.mixture.a.train"]
    assert "greater than 0" in problems["data.mixture.b.weight"]
