"""What worker groups of private runs run, with hooks for single rows that may be wrong."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dist_ft.process.place import Place
from tests.dist.cases import run_case
from tests.private import turn_rows


def run_and_look(place: Place, cases: list[dict[str, Any]]) -> list[bool]:
    """Each case in turn, with hooks that mistake one row for another on the rank that it names."""
    found = []
    for case in cases:
        with warnings.catch_warnings(record=True) as seen, pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("always")
            if case.get("wrong_on") == place.rank:
                patch.setitem(GradSampleHooks.GRAD_SAMPLERS, nn.Linear, turn_rows)
            run_case(place, case)
        found.append(any("one by one" in str(warning.message) for warning in seen))
    return found
