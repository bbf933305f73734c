"""Tests of token tables and packing: every token occurs once, and no sample exceeds the maximum length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_ft.data.store.pack import Samples, count_shifted, cut_blocks, in_groups, pack_best_fit, pack_in_order
from dist_ft.data.store.table import TableWriter, TokenTable

RANDOM = np.random.default_rng(5)


def test_a_table_gives_back_its_rows(tmp_path: Path) -> None:
    rows = [{"a": list(range(n)), "b": [-100] * n} for n in (3, 0, 5, 1, 2**4)]
    with TableWriter(tmp_path, ("a", "b")) as writer:
        for part in (rows[:3], rows[3:]):
            writer.extend(TokenTable.of(part))
    table = TokenTable.open(tmp_path)
    assert isinstance(table.columns["a"], np.memmap) and table.columns["a"].dtype == np.int32
    assert len(table) == 5 and table.tokens == 25 and table.lengths.tolist() == [3, 0, 5, 1, 16]
    for opened in (table, TokenTable.of(rows)):
        assert [{k: v.tolist() for k, v in opened.example(i).items()} for i in range(5)] == rows
        assert opened.example(2, 1, 3)["a"].tolist() == [1, 2]
    assert np.load(tmp_path / "tokens-a.npy").tolist() == [n for row in rows for n in row["a"]]


def test_an_empty_table_opens(tmp_path: Path) -> None:
    with TableWriter(tmp_path, ("a",)):
        pass
    assert len(TokenTable.open(tmp_path)) == 0


def covered(samples: Samples, lengths: np.ndarray) -> bool:
    """Return whether every token of every row is in exactly one segment."""
    seen = [np.zeros(n, dtype=int) for n in lengths]
    for i in range(len(samples)):
        for row, start, stop in samples[i]:
            seen[row][start:stop] += 1
    return all((row == 1).all() for row in seen)


@pytest.mark.parametrize("max_length", [4, 7, 16, 64])
@pytest.mark.parametrize("count", [1, 2, 50, 400])
def test_blocks_are_full_in_order_and_lose_nothing(max_length: int, count: int) -> None:
    lengths = RANDOM.integers(0, 40, count)
    lengths[0] = 3
    samples = cut_blocks(lengths, max_length)
    flat = [(row, t) for row, n in enumerate(lengths.tolist()) for t in range(n)]  # reference: cut the whole list
    expected = [flat[i : i + max_length] for i in range(0, len(flat), max_length)]
    got = [[(row, t) for row, start, stop in samples[i] for t in range(start, stop)] for i in range(len(samples))]
    assert got == expected
    assert samples.lengths.tolist() == [len(block) for block in expected]
    for i in range(len(samples)):
        assert len({row for row, _, _ in samples[i]}) == len(samples[i]), "a row has one segment per block"


@pytest.mark.parametrize("plan", [pack_best_fit, pack_in_order])
def test_packs_hold_whole_rows_within_the_limit(plan: object) -> None:
    lengths = RANDOM.integers(1, 65, 500)
    samples = plan(lengths, 64)  # type: ignore[operator]
    assert covered(samples, lengths)
    assert samples.lengths.max() <= 64
    assert all(start == 0 and stop == lengths[row] for i in range(len(samples)) for row, start, stop in samples[i])


def test_packing_in_order_keeps_the_file_order() -> None:
    samples = pack_in_order(np.array([30, 30, 10, 60, 4, 1]), 64)
    assert [[row for row, _, _ in samples[i]] for i in range(len(samples))] == [[0, 1], [2], [3, 4], [5]]


def test_best_fit_is_the_textbooks_and_close_to_full() -> None:
    lengths = RANDOM.integers(1, 60, 300)
    rooms: list[int] = []
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):  # reference: quadratic best fit
        fitting = [p for p in range(len(packs)) if rooms[p] >= lengths[row]]
        pack = min(fitting, key=lambda p: rooms[p], default=None)
        if pack is None:
            pack = len(packs)
            packs.append([])
            rooms.append(64)
        packs[pack].append(row)
        rooms[pack] -= int(lengths[row])
    samples = pack_best_fit(lengths, 64)
    assert len(samples) == len(packs)
    assert sorted(samples.lengths.tolist()) == sorted(64 - room for room in rooms)
    assert lengths.sum() / (len(samples) * 64) > 0.94


def test_samples_are_saved_selected_and_loaded(tmp_path: Path) -> None:
    samples = Samples.of([[(0, 0, 3), (2, 1, 2)], [(1, 0, 4)], [(3, 0, 1)]])
    samples.save(tmp_path)
    loaded = Samples.load(tmp_path)
    assert [loaded[i] for i in range(3)] == [[(0, 0, 3), (2, 1, 2)], [(1, 0, 4)], [(3, 0, 1)]]
    kept = loaded.select(np.array([True, False, True]))
    assert [kept[i] for i in range(len(kept))] == [[(0, 0, 3), (2, 1, 2)], [(3, 0, 1)]]
    assert in_groups(np.array([2, 5]))[1] == [(1, 0, 5)]
    with pytest.raises(IndexError):
        loaded[3]


def test_targets_are_labels_but_for_first_tokens_of_segments() -> None:
    table = TokenTable.of([{"labels": [5, 6, -100, 7]}, {"labels": [-100, 8]}])
    samples = Samples.of([[(0, 0, 4)], [(0, 0, 2), (1, 0, 2)], [(0, 3, 4)]])
    assert count_shifted(table, samples, -100).tolist() == [2, 2, 0]


def test_targets_are_counted_whatever_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"labels": RANDOM.choice([-100, 3], size=length)} for length in RANDOM.integers(0, 12, size=60)]
    table = TokenTable.of(rows)
    samples = pack_best_fit(table.lengths, 12)
    segments = [samples[i] for i in range(len(samples))]
    expected = [sum(int((rows[row]["labels"][1:] == 3).sum()) for row, _, _ in parts) for parts in segments]
    for size in (1, 30, 10_000):
        monkeypatch.setattr("dist_ft.data.store.pack._TOKENS_AT_ONCE", size)
        assert count_shifted(table, samples, -100).tolist() == expected
