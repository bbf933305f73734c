"""All checks together."""

from __future__ import annotations

from tests.unit.checks.found import found


def test_a_sound_configuration_has_no_problem():
    assert found() == {}
