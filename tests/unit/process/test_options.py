"""Tests of the `KEY=VALUE` words: they are validated strictly, and all errors are reported at once."""

from __future__ import annotations

import pytest
from pydantic import Field

from dist_ft.config.strict import Strict
from dist_ft.errors import RequestError
from dist_ft.process.options import read_words


class Options(Strict):
    prompt: str | None = None
    count: int = Field(3, description="how many", ge=1)
    loud: bool = False


def test_values_have_their_types_and_text_stays_text() -> None:
    assert read_words(Options, ["prompt=1=2: yes", "count=5", "loud=true"]) == Options(
        prompt="1=2: yes", count=5, loud=True
    )
    assert read_words(Options, ["prompt=null"]).prompt == "null"


def test_all_faults_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        read_words(Options, ["cuont=1", "hello", "count=2", "count=3"])
    assert [problem.where for problem in caught.value.problems] == ["cuont=1", "hello", "count=3"]
    assert "count=…" in caught.value.problems[0].way_out
    with pytest.raises(RequestError) as caught:
        read_words(Options, ["count=0", "loud=perhaps"])
    assert [problem.where for problem in caught.value.problems] == ["count", "loud"]
    assert "count: how many" in caught.value.problems[0].way_out
