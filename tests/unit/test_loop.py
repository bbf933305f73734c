"""Seeds of a step."""

from __future__ import annotations

import pytest
import torch

from dist_ft.loop import step_seed


@pytest.mark.parametrize("seed", [0, 7, 2026112401, 2**63, 2**64 - 1])
def test_every_seed_of_the_configuration_is_one_that_torch_takes(seed: int) -> None:
    torch.manual_seed(seed)
    torch.manual_seed(step_seed(seed, 10**6, 511))


def test_steps_and_ranks_draw_differently_and_repeatably() -> None:
    drawn = {}
    for seed, step, rank in [(s, n, r) for s in (1, 2026112401) for n in (1, 2) for r in (0, 1)]:
        torch.manual_seed(step_seed(seed, step, rank))
        drawn[seed, step, rank] = tuple(torch.rand(4).tolist())
        torch.manual_seed(step_seed(seed, step, rank))
        assert tuple(torch.rand(4).tolist()) == drawn[seed, step, rank]
    assert len(set(drawn.values())) == len(drawn)
