"""Rows of conversations become one sequence, or one for each supervised turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.run import RunConfig
from dist_ft.config.task import InstructionConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.data.render.turns import Supervision
from dist_ft.prepare import prepare
from dist_ft.task.instruction import Instruction
from tests.unit.data.render.chats import CHAT, CHATML, make_tokenizer

LONG = [*CHAT[:3], {"role": "assistant", "content": "It is Paris. " * 9}]


def parts(config: dict[str, Any]) -> tuple[Instruction, ChatTokenizer]:
    """A task and its tokenizer."""
    task = InstructionConfig(name="instruction", **config)
    return Instruction(task, padding_free=True), ChatTokenizer(make_tokenizer(CHATML), Supervision.of(task))


def test_each_turn_is_a_sequence_if_asked() -> None:
    task, tokenizer = parts({"one_row_per_turn": True})
    whole, plain = parts({})
    rows = task.encode({"messages": CHAT}, tokenizer)
    assert rows[0] == plain.encode_messages(CHAT[:2])
    assert rows[1] == plain.encode_messages(CHAT, context=2) and len(rows) == 2
    assert whole.encode({"messages": CHAT}, plain) == [plain.encode_messages(CHAT)]
    assert task.encode({"messages": CHAT, "context": 2}, tokenizer) == rows[1:]


def test_of_truncated_sequences_the_supervised_ones_are_kept() -> None:
    task, tokenizer = parts({"one_row_per_turn": True})
    first, second = (len(row["input_ids"]) for row in task.encode({"messages": LONG}, tokenizer))
    for size, count in ((second - 3, 2), (first + 4, 1)):
        task, tokenizer = parts({"one_row_per_turn": True, "max_length": size})
        cut = task.truncate({"messages": LONG}, tokenizer)
        assert [len(row["input_ids"]) for row in cut] == [first, size][:count]
    task, tokenizer = parts({"one_row_per_turn": True, "max_length": 4})
    with pytest.raises(RowFault, match=r"within the first task\.max_length tokens"):
        task.truncate({"messages": LONG}, tokenizer)


def test_a_prepared_row_has_a_sample_for_each_turn(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (CHAT, CHAT[:2])))
    config = RunConfig.model_validate(
        {
            "run_name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
            "task": {"name": "instruction", "one_row_per_turn": True, "train_on_eos": "none"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 1, "per_device_train_batch_size": 1},
            "track": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }
    )
    split = prepare(config).train
    assert (split.ledger["rows_kept"], split.ledger["samples"]) == (2, 3)
