"""Batch sizes that adapt, compared with a search over all sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.checks.batch import GLOBAL, MICRO, batch_problems, largest_divisor, settle_batch
from tests.unit.checks.found import composed

SHIPPED = "conf/experiment/any.yaml"


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_largest_divisor_is_that_of_a_search(limit: int) -> None:
    for number in range(1, 50):
        assert largest_divisor(number, limit) == max(d for d in range(1, limit + 1) if number % d == 0)


@pytest.mark.parametrize("size", [8, 30, 32, 64, 100, 128])
@pytest.mark.parametrize("micro", [1, 4, 7, 16])
def test_adapted_sizes_are_the_best_of_all(size: int, micro: int) -> None:
    run = composed(f"{GLOBAL}={size}", f"{MICRO}={micro}")
    for workers in (1, 2, 3, 5, 6, 7, 8, 12, 16):
        config, origins = settle_batch(run.config, {GLOBAL: SHIPPED, MICRO: SHIPPED}, workers)
        found = config.train.global_batch_size, config.train.per_device_train_batch_size
        assert batch_problems(config, origins, 1, workers) == []
        near = [(s, m) for s in range(1, 2 * size) for m in range(1, micro + 1) if s % (workers * m) == 0]
        near = [(s, m) for s, m in near if abs(s - size) <= size / 8]
        if size % workers == 0:
            best = max(m for s, m in near if s == size)
            assert found == (size, best)
        elif near:
            best = max(m for _, m in near)
            assert found[1] >= best
            assert abs(found[0] - size) == min(abs(s - size) for s, m in near if m == best)


def test_set_sizes_are_never_changed() -> None:
    run = composed(f"{GLOBAL}=31", f"{MICRO}=3")
    config, origins = settle_batch(run.config, run.origins, 2)
    assert (config, origins) == (run.config, run.origins)
    (found,) = batch_problems(config, origins, 1, 2)
    assert found.rule == "31 rows per step cannot be divided into micro-batches of 3 rows on 2 workers"


def test_advice_for_several_nodes_and_few_rows() -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    run = composed(f"{GLOBAL}=31")
    (found,) = batch_problems(run.config, run.origins, 2, 4)
    assert found.way_out == "set launch.workers_per_node=2 and train.global_batch_size=4"
    (found,) = batch_problems(run.config, run.origins, 6, 4)
    assert found.way_out == "add rows, or use at most 5 nodes"


def test_rows_of_the_hub_are_not_counted() -> None:
    run = composed(f"{GLOBAL}=31", "data.train=a/b")
    (found,) = batch_problems(run.config, run.origins, 1, 2)
    assert found.way_out == "set train.global_batch_size=32"
