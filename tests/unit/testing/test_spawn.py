"""Groups of worker processes."""

from __future__ import annotations

import pytest

from dist_ft.testing.spawn import spawn


@pytest.mark.parametrize("fresh", [False, True])
def test_each_rank_returns_its_own_value(fresh: bool) -> None:
    ranks = spawn(2, "tests.ranks:report", [1], fresh=fresh)
    assert ranks == [{"rank": 0, "world": 2, "given": [1]}, {"rank": 1, "world": 2, "given": [1]}]


def test_the_output_of_a_failed_rank_is_in_the_error() -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[1\](.|\n)*has no attribute 'missing'"):
        spawn(1, "tests.ranks:missing", None)
