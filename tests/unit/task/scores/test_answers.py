"""Answer spans are found, ranked and scored, and answers are read, as defined by SQuAD and its official scripts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dist_ft.data.read.faults import InvalidRow
from dist_ft.data.read.formats import detect, normalise
from dist_ft.task.batches.answer_spans import answer_rows, find_answer, rank_spans
from dist_ft.task.scores.answers import measure
from tests.samples import question_row as row


def test_spans_are_ranked_as_by_brute_force() -> None:
    dice = torch.Generator().manual_seed(1)
    starts, ends = torch.randn(5, 17, generator=dice), torch.randn(5, 17, generator=dice)
    allowed = torch.rand(5, 17, generator=dice) < 0.6
    allowed[3] = False
    for longest, count in ((1, 4), (5, 7), (40, 1000)):
        for i, found in enumerate(rank_spans(starts, ends, allowed, longest, count)):
            spans = [
                (first, last, float(starts[i, first] + ends[i, last]))
                for first, last in itertools.product(range(17), repeat=2)
                if allowed[i, first] and allowed[i, last] and first <= last < first + longest
            ]
            assert found == sorted(spans, key=lambda span: (-span[2], span[0], span[1]))[:count]
    assert rank_spans(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4).bool(), 2, 3)[0] == [
        (0, 0, 0.0),
        (0, 1, 0.0),
        (1, 1, 0.0),
    ]


def pieces_of(*scores: tuple[int, list[tuple[int, int, float]], float]) -> list[dict[str, Any]]:
    return [{"sample": i, "origin": o, "spans": s, "null": n} for i, (o, s, n) in enumerate(scores)]


def test_a_row_takes_the_best_of_its_pieces() -> None:
    rows = [{**row("one two three", "?", "two"), "id": "x"}, row("four", "?", "four")]
    pieces = pieces_of((0, [(0, 3, 1.0), (0, 7, 0.5)], 9.0), (1, [(0, 4, -1.0)], 0.0), (0, [(4, 7, 2.0)], -3.0))
    first, second = answer_rows(pieces, rows, 2, None)
    assert (first["sample"], first["prediction"], first["start"], first["id"]) == (0, "two", 4, "x")
    assert first["score"] == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0)[0].item(), abs=1e-6)  # of the best two
    assert (second["sample"], second["prediction"], second["score"], second["answers"]) == (1, "four", 1.0, ["four"])


@pytest.mark.parametrize(("threshold", "text"), [(0.0, ""), (0.99, ""), (1.0, "two"), (5.0, "two")])
def test_nothing_is_the_answer_beyond_the_threshold(threshold: float, text: str) -> None:
    """The null score of a row is the minimum over its chunks, here 3; the score of the best span is 2."""
    pieces = pieces_of((0, [(4, 7, 2.0)], 3.0), (0, [(0, 3, 1.0)], 8.0))
    (found,) = answer_rows(pieces, [row("one two three", "?")], 20, threshold)
    shares = torch.tensor([2.0, 1.0, 3.0]).softmax(0).tolist()
    assert found["null_score_diff"] == 1.0
    assert (found["prediction"], found["start"]) == (text, 4 if text else None)
    assert found["score"] == pytest.approx(shares[0] if text else shares[2], abs=1e-6)


def test_scores_are_counted_as_squad_does() -> None:
    """Case, punctuation and articles are ignored, and the best answer of a row counts; computed by hand."""
    rows = [
        {"prediction": "The Beatles!", "answers": ["beatles", "Wings"]},
        {"prediction": "John Lennon and Paul", "answers": ["Paul Lennon"]},  # precision 2/4, recall 2/2
        {"prediction": "بيروت", "answers": ["القاهرة"]},
        {"prediction": "b b c", "answers": ["b c c"]},  # repeated words count as often as they occur in both
    ]
    found = measure(rows)
    assert found == {
        "exact_match": pytest.approx(1 / 4),
        "f1": pytest.approx((1 + 2 * 0.5 / 1.5 + 0 + 2 / 3) / 4),
    }


def test_rows_without_an_answer_are_scored_by_themselves() -> None:
    rows = [
        {"prediction": "", "answers": []},
        {"prediction": "x", "answers": []},
        {"prediction": "", "answers": ["x"]},
        {"prediction": "x y", "answers": ["x"]},
    ]
    assert measure(rows) == {
        "exact_match": 1 / 4,
        "f1": pytest.approx((1 + 0 + 0 + 2 / 3) / 4),
        "exact_match_unanswerable": 1 / 2,
        "exact_match_answerable": 0.0,
        "f1_answerable": pytest.approx(1 / 3),
    }
    assert set(measure(rows[:2])) == {"exact_match", "f1", "exact_match_unanswerable"}


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("two", 4, 4),
        ("two", None, 4),  # the first occurrence
        ("two", 0, 4),
        ("two", 9, 8),  # the occurrence nearest to a wrong offset
        ("two", 10**6, 8),
        ("two", -1, 4),
        (" two ", 3, 4),
        ("Two", 4, None),
    ],
)
def test_answers_are_looked_for(text: str, start: int | None, found: int | None) -> None:
    span = find_answer("one two two", {"text": [text], "answer_start": [start]})
    assert span == (None if found is None else (found, found + 3))
    assert find_answer("one two", {"text": ["six", "two"], "answer_start": [0, 4]}) == (4, 7)


SQUAD = {"id": "7", "title": "t", "context": "a b", "question": "b?"}


@pytest.mark.parametrize(
    ("columns", "texts", "starts"),
    [
        ({"answers": {"text": ["b", "a b"], "answer_start": [2, 0]}}, ["b", "a b"], [2, 0]),
        ({"answers": {"text": [], "answer_start": []}, "is_impossible": True}, [], []),
        ({"answers": [{"text": "b", "answer_start": 2}, {"text": "a"}]}, ["b", "a"], [2, None]),
        ({"answers": ["b", "", "a"]}, ["b", "a"], [None, None]),
        ({"answers": "b", "answer_start": "2"}, ["b"], [2]),  # as read from CSV
        ({"answer": "b"}, ["b"], [None]),
        ({"answers": None}, [], []),
        ({"answers": {"text": ["a", "b"], "answer_start": [0]}}, ["a", "b"], [None, None]),
    ],
)
def test_format_squad(columns: dict[str, Any], texts: list[str], starts: list[int | None]) -> None:
    given = {**SQUAD, **columns}
    assert detect(given, task="question_answering") == "squad"
    canonical = normalise(given, "auto", {})
    assert canonical == {
        "id": "7",
        "context": "a b",
        "question": "b?",
        "answers": {"text": texts, "answer_start": starts},
    }


@pytest.mark.parametrize("answers", [3, {"text": [1]}, [["b"]], [{"text": "b"}, "a"]])
def test_answers_of_another_shape_are_refused(answers: Any) -> None:
    with pytest.raises(InvalidRow, match="neither strings nor SQuAD's"):
        normalise({**SQUAD, "answers": answers}, "squad", {})
