"""Tests of mixtures: datasets are prepared separately, concatenated, and reported by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_ft.assess.turns import read_questions
from dist_ft.build import build_loader, build_order
from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.data.order.proportions import describe_mixture, proportions
from dist_ft.data.store.identity import is_prepared, split_folder
from dist_ft.errors import RequestError
from dist_ft.export.card import render_card
from dist_ft.families import build_task
from dist_ft.inspect import rows as view
from dist_ft.inspect.ledger import ledger_tables
from dist_ft.model.attention.choice import AttentionChoice
from dist_ft.prepare import prepare
from dist_ft.process.place import Place
from dist_ft.state import REFERENCE, Sample
from dist_ft.task.by_set import LossBySet

SUMS = [{"question": f"{n} plus one?", "answer": f"It is {n + 1}."} for n in range(6)]
PAIRS = [{"en": f"word {n}", "sv": f"ord {n}"} for n in range(10)]
ASK = {"instruction": "Reckon: {question}", "output": "{answer}"}
SAY = {"prompt": "Translate: {en}\n", "completion": "{sv}"}


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Any:
    """Return a function that builds a configuration and writes lists of rows to files."""

    def settle(given: Any, name: str) -> Any:
        if isinstance(given, dict):
            return {key: settle(value, f"{name}-{key}") for key, value in given.items()}
        if isinstance(given, list) and given and isinstance(given[0], dict):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
            return str(path)
        return given

    def config_of(data: dict[str, Any], **changes: Any) -> RunConfig:
        content: dict[str, Any] = {
            "run_name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
            "task": {"name": "instruction", "max_length": 96},
            "data": {**settle(data, "rows"), "cache_dir": str(tmp_path / "cache")},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 4, "per_device_train_batch_size": 2, "num_train_epochs": 3},
            "track": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }
        for group, keys in changes.items():
            content[group] = {**content[group], **keys}
        return RunConfig.model_validate(content)

    return config_of


def two(weights: tuple[float | None, float | None] = (None, None), **more: Any) -> dict[str, Any]:
    sums = {"train": SUMS, "validation": SUMS[:2], "template": ASK, "weight": weights[0]}
    pairs = {"train": PAIRS, "validation": PAIRS[:3], "template": SAY, "weight": weights[1]}
    return {"mixture": {"sums": sums, "pairs": pairs}, **more}


def batches(config: RunConfig, world: int = 1) -> list[list[Any]]:
    """Return the micro-batches of all ranks for every step."""
    plan = make_plan(config, nodes=1, workers_per_node=world, origins={})
    prepared = prepare(config)
    task = build_task(config, prepared.facts, AttentionChoice("sdpa", "documents_sdpa", True, "for a test"))
    order, steps = build_order(plan, prepared.train, Place())
    loaders = [
        build_loader(plan, task, prepared.train, Place(rank=rank, world_size=world, local_rank=rank), order)
        for rank in range(world)
    ]
    return [[micro for loader in loaders for micro in loader.step(step)] for step in range(1, steps + 1)]


def test_each_set_has_its_own_template_and_format(make: Any, tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    prepared = prepare(make(two()))
    train, tokenizer = prepared.train, AutoTokenizer.from_pretrained(tiny_tokenizer)
    assert list(train.parts) == ["pairs", "sums"]
    assert train.parts["sums"].ledger["formats"] == ["alpaca"]
    assert train.parts["pairs"].ledger["formats"] == ["prompt_completion"]
    table, samples = train.open_table(), train.open_samples()
    texts = [tokenizer.decode(table.example(*samples[n][0])["input_ids"]) for n in range(len(samples))]
    assert texts[3] == "Translate: word 3\nord 3<|im_end|>"
    chat = "<|im_start|>user\nReckon: 2 plus one?<|im_end|>\n<|im_start|>assistant\nIt is 3.<|im_end|>"
    assert texts[12].strip() == chat


def test_sets_seen_as_one_are_what_each_is_alone(make: Any) -> None:
    joined = prepare(make(two()))
    for split in (joined.train, joined.validation):
        assert split is not None
        table, samples = split.open_table(), split.open_samples()
        alone = [(part.open_table(), part.open_samples()) for part in split.parts.values()]
        expected = [own.example(*places[n][0]) for own, places in alone for n in range(len(places))]
        assert len(samples) == len(table) == len(expected) == split.ledger["samples"]
        assert samples.lengths.tolist() == [len(row["input_ids"]) for row in expected] == table.lengths.tolist()
        for n, row in enumerate(expected):
            found = table.example(*samples[n][0])
            assert all(np.array_equal(found[name], row[name]) for name in row)
        for key in ("rows_read", "rows_kept", "tokens", "supervised_tokens"):
            assert split.ledger[key] == sum(part.ledger[key] for part in split.parts.values())
        with pytest.raises(IndexError):
            samples[len(samples)]


def test_a_mixture_of_one_set_is_the_set_bit_by_bit(make: Any) -> None:
    plain = make({"train": SUMS, "template": ASK})
    mixed = make({"mixture": {"only": {"train": plain.data.train, "template": ASK, "weight": 3}}})
    assert split_folder(plain, "train") == split_folder(mixed, "train", "only")
    for one, other in zip(batches(plain), batches(mixed), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.samples == b.samples and a.tokens == b.tokens
            assert a.inputs["input_ids"].equal(b.inputs["input_ids"]) and a.targets.equal(b.targets)


def test_changing_a_weight_tokenises_nothing_again(make: Any) -> None:
    first = prepare(make(two((1, 1))))
    times = {name: Path(part.table).stat().st_mtime_ns for name, part in first.train.parts.items()}
    changed = make(two((9, 1)))
    assert is_prepared(changed) and is_prepared(make(two()))
    found = prepare(changed).train.parts
    assert {name: Path(part.table).stat().st_mtime_ns for name, part in found.items()} == times
    another = make({"mixture": {**two()["mixture"], "third": {"train": PAIRS[:4], "template": SAY}}})
    assert not is_prepared(another)
    assert split_folder(another, "train", "sums") == split_folder(changed, "train", "sums")


def test_ranks_see_the_same_steps(make: Any) -> None:
    config = make(two((3, 1)), train={"num_train_epochs": None, "max_steps": 9})

    def samples(world: int) -> list[list[int]]:
        return [sorted(n for micro in step for n in micro.samples) for step in batches(config, world)]

    assert samples(1) == samples(2)
    pairs = [sum(n < 10 for n in step) for step in samples(1)]  # one of four samples in each global batch
    assert pairs == [1] * 9


def test_what_a_run_sees_of_each_set_is_told(make: Any) -> None:
    config = make(two((3, 1)))
    prepared = prepare(config)
    pairs, sums = proportions(config, prepared.train)
    steps = batches(config)
    seen = [n for step in steps for micro in step for n in micro.samples]
    assert (pairs.seen, sums.seen) == (sum(n < 10 for n in seen), sum(n >= 10 for n in seen)) == (12, 36)
    assert (pairs.times, sums.times) == (1.2, 6.0) and (pairs.share, sums.share) == (0.25, 0.75)
    supervised = {True: 0, False: 0}
    for step in steps:
        for micro in step:
            for document in micro.documents.tolist():
                supervised[micro.samples[document] < 10] += 1
    assert pairs.token_share == pytest.approx(supervised[True] / sum(supervised.values()), rel=0.02)
    assert sums.token_share + pairs.token_share == pytest.approx(1)
    (line, _) = describe_mixture(config, prepared.train)
    assert line.startswith("pairs: 25.0% of the samples") and "its 10 samples is seen 1.20 times" in line
    titles = [str(table.title) for table in ledger_tables(config, prepared.train, "train")]
    assert titles == ["data.mixture.pairs.train", "data.mixture.sums.train", "data.mixture over the run"]
    assert list(describe_mixture(make({"train": SUMS, "template": ASK}), prepared.train.parts["sums"])) == []


def test_problems_name_their_set_and_come_together(make: Any) -> None:
    data = two()
    data["mixture"]["sums"]["template"] = {**ASK, "output": "{solution}"}
    data["mixture"]["pairs"]["train"] = [*PAIRS, {"en": "word"}]
    with pytest.raises(RequestError) as caught:
        prepare(make(data))
    pairs, sums = caught.value.problems
    assert pairs.where == "data.mixture.pairs.train" and "1 row (of 11 read) cannot be used" in pairs.rule
    assert "rows-mixture-pairs-train.jsonl:11" in pairs.rule
    assert sums.where == "data.mixture.sums.train"
    assert "6 because column solution, used by the template, does not exist (columns: question, answer)" in sums.rule
    kept = prepare(make({"mixture": {"pairs": {**data["mixture"]["pairs"], "invalid_rows": "drop"}}}))
    assert kept.train.ledger["rows_kept"] == 10 and kept.train.ledger["rows_read"] == 11


def test_general_text_is_replayed_as_it_is(make: Any, tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    general = {
        "train": [{"text": f"Some {n} words."} for n in range(4)],
        "template": {"prompt": "", "completion": "{text}"},
    }
    config = make(
        {"mixture": {"general": {**general, "weight": 0.1}, "sums": {**two()["mixture"]["sums"], "weight": 0.9}}}
    )
    prepared = prepare(config)
    example = prepared.train.open_table().example(0)
    supervised = example["labels"][example["labels"] != -100]
    assert AutoTokenizer.from_pretrained(tiny_tokenizer).decode(supervised) == "Some 0 words.<|im_end|>"
    assert [found.share for found in proportions(config, prepared.train)] == [0.1, 0.9]
    lines = render_card(make_plan(config, nodes=1, workers_per_node=1, origins={}), prepared, {}, {}).splitlines()
    assert any(line.startswith("| train (general) |") for line in lines)
    assert any(line.startswith("sums: 90.0% of the samples") for line in lines)


def test_packing_stays_inside_a_set(make: Any) -> None:
    train = prepare(make(two(), task={"packing": True}, train={"global_batch_size": 2})).train
    samples, rows = train.open_samples(), len(train.parts["pairs"].open_table())
    assert len(samples) < 16
    for n in range(len(samples)):
        assert len({row < rows for row, _, _ in samples[n]}) == 1


def test_labels_are_found_over_all_sets(make: Any) -> None:
    films = [{"text": f"film {n}", "label": ("bad", "good")[n % 2]} for n in range(6)]
    books = [{"review": f"book {n}", "stars": ("fair", "good")[n % 2]} for n in range(4)]
    again = {"text": "{review}", "label": "{stars}"}
    data = {"mixture": {"films": {"train": films}, "books": {"train": books, "validation": books, "template": again}}}
    task = {"name": "sequence_classification", "max_length": 32}
    config = make(data, task=task)
    prepared = prepare(config)
    assert prepared.facts.labels == ("bad", "fair", "good") and prepared.facts.label_counts == (3, 2, 5)
    labels = [int(prepared.train.open_table().example(n)["label"][0]) for n in range(10)]
    assert labels == [1, 2, 1, 2, 0, 2, 0, 2, 0, 2]
    assert prepared.validation is not None and list(prepared.validation.parts) == ["books"]
    alone = make({"train": films}, task=task)
    assert split_folder(alone, "train") != split_folder(config, "train", "films")  # label ids differ in the mixture
    mixed = [{"text": "x", "label": n % 2} for n in range(4)]
    with pytest.raises(RequestError, match=r"^data.mixture: some labels are integers and some are strings[^:]*$"):
        prepare(make({"mixture": {"a": {"train": films}, "b": {"train": mixed}}}, task=task))


def test_pairs_of_a_mixture_keep_their_reference_and_have_losses_of_their_own(make: Any, tiny_llama: Path) -> None:
    def pairs(word: str, count: int) -> list[dict[str, Any]]:
        return [{"prompt": f"{word} {n} ", "chosen": "yes" * (n + 1), "rejected": "no"} for n in range(count)]

    data = {"mixture": {"a": {"train": pairs("one", 3)}, "b": {"train": pairs("two", 2)}}}
    config = make(data, task={"name": "preference"})
    prepared = prepare(config)
    kept = np.arange(10, dtype=np.float64).reshape(5, 2) - 40
    train = replace(prepared.train, reference=kept)
    table, samples = train.open_table(), train.open_samples()
    chosen = [Sample([table.example(*segment) for segment in samples[n]], n) for n in range(5)]
    for sample in chosen:
        assert [float(segment[REFERENCE][0]) for segment in sample.segments] == kept[sample.index].tolist()
    task: Any = build_task(config, prepared.facts, AttentionChoice("sdpa", "sdpa", False, "for a test"))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()
    with torch.no_grad():
        told = LossBySet(task, train.sizes).loss(model, task.collate([chosen[n] for n in (4, 0, 2)]))
        alone = [float(task.loss(model, task.collate([chosen[n]])).loss) for n in range(5)]
    assert float(told.counts["loss@a"]) == pytest.approx(alone[0] + alone[2], rel=1e-5)
    assert float(told.counts["loss@b"]) == pytest.approx(alone[4], rel=1e-5)
    assert (float(told.counts["weight@a"]), float(told.counts["weight@b"])) == (2, 1)


def test_rows_and_questions_of_each_set_are_shown(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(two((3, 1)))
    run_file = write_plan(make_plan(config, nodes=1, workers_per_node=1, origins={}))
    assert view.main([str(run_file), "rows=1", "width=120"]) == 0
    shown = capsys.readouterr().out
    assert "── sums ──" in shown and "[[It is 1.<|im_end|>]]" in shown and "[[ord 0<|im_end|>]]" in shown
    assert "data.mixture over the run" in shown and shown.count("rows read") == 2
    questions = list(read_questions(config, "validation", 1))
    assert [q.text for q in questions] == ["Translate: word 0\n", "Reckon: 0 plus one?"]
    assert [q.answer for q in questions] == ["ord 0", "It is 1."]
