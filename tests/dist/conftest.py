"""The tiny model and the uneven rows that the distributed tests share."""

from __future__ import annotations

import json
import random

import pytest

from dist_ft.testing import tiny

pytest.register_assert_rewrite("tests.dist.outcomes")  # so that its assertions say what differs


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return tiny.save("llama", folder, num_hidden_layers=3, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    """Rows of very uneven lengths and supervised shares: in some only the last token is supervised."""
    dice = random.Random(7)
    rows = []
    for i in range(37):
        length = dice.randint(3, 40)
        ids = [dice.randrange(tiny.VOCABULARY) for _ in range(length)]
        prompt = length - 1 if i % 5 == 0 else dice.randint(0, length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), rows
