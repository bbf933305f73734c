"""Tests of data augmentation, with nlpaug and with stand-in augmenters of known output."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from nlpaug.augmenter.char import KeyboardAug
from transformers import AutoTokenizer

from dist_ft.checks.data import augment_problems
from dist_ft.checks.machine import check_machine
from dist_ft.checks.request import check
from dist_ft.config.data import AugmentConfig
from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.data.read import augment as augment_rules
from dist_ft.data.read import augment as augmenting
from dist_ft.data.read.augment import MODULES, Augmenter, augment_identity, open_augmenter
from dist_ft.data.read.chosen import choose
from dist_ft.data.store.identity import is_prepared, split_folder
from dist_ft.errors import MachineError, RequestError
from dist_ft.export.card import render_card
from dist_ft.inspect import rows as view
from dist_ft.inspect.ledger import ledger_tables
from dist_ft.launch.composition.compose import compose
from dist_ft.prepare import prepare

KEYBOARD = {"name": "KeyboardAug", "options": {"aug_char_p": 0.2}, "columns": ["text"]}
TEXTS = ["The invoice is wrong", "my screen stays black", "where is the parcel", "cancel this subscription please"]
ROWS: list[dict[str, Any]] = [{"text": f"{TEXTS[n % 4]} {n}", "label": ["no", "yes"][n % 2]} for n in range(12)]
OWN: dict[str, Callable[[str], Sequence[str]]] = {  # stand-in augmenters, selected by the option `own`
    "loud": lambda text: [text.upper() + "!"],
    "long": lambda text: [text + " word" * 400],
    "same": lambda text: [text],
    "several": lambda text: [text, text + " a", text + " b"],
    "drawn": lambda text: [f"{text} {random.random()} {np.random.rand()}"],
    "letter": lambda word: [word[::-1]],
    "longer": lambda word: [word + " more"],
    "nothing": lambda text: [" "],
    "broken": lambda text: [{}[text]],
}


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        augmenting,
        "open_augmenter",
        lambda augment, key: OWN[augment.options["own"]] if "own" in augment.options else open_augmenter(augment, key),
    )

    def config_of(augment: Any, rows: Any = ROWS, data: Any = None, task: Any = None, **changes: Any) -> RunConfig:
        for name in ("rows", "validation"):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
        content: dict[str, Any] = {
            "run_name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
            "task": {"name": "sequence_classification", "max_length": 192, **(task or {})},
            "data": {**files, "cache_dir": str(tmp_path / "cache"), "augment": augment, **(data or {})},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 2, "per_device_train_batch_size": 2, "max_steps": 1},
            "track": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }
        for group, keys in changes.items():
            content[group] = {**content[group], **keys} if group in content else keys
        if content["data"].get("mixture"):
            del content["data"]["train"], content["data"]["validation"], content["data"]["augment"]
        return RunConfig.model_validate(content)

    return config_of


def own(name: str, *columns: str, **more: Any) -> dict[str, Any]:
    return {"name": "KeyboardAug", "options": {"own": name}, "columns": list(columns or ["text"]), **more}


def decoded(split: Any, tiny_llama: Path) -> list[tuple[str, list[int]]]:
    tokenizer, table = AutoTokenizer.from_pretrained(tiny_llama), split.open_table()
    rows = [table.example(n) for n in range(len(table))]
    return [(tokenizer.decode(row["input_ids"]), np.asarray(row.get("label", [])).tolist()) for row in rows]


def test_a_library_adds_changed_rows_with_their_labels_to_the_training_split_only(make: Any, tiny_llama: Path) -> None:
    config = make(KEYBOARD)
    prepared = prepare(config)
    found, plain = decoded(prepared.train, tiny_llama), decoded(prepared.validation, tiny_llama)
    ledger = prepared.train.ledger
    assert [text for text, _ in plain] == [row["text"] for row in ROWS]
    assert ledger["augmented"] + ledger["unchanged"] == ledger["rows_read"] == 12 and ledger["augmented"] >= 8
    assert len(found) == ledger["rows_kept"] == ledger["samples"] == 12 + ledger["augmented"]
    at = 0
    for row, (_, label) in zip(ROWS, plain, strict=True):
        assert found[at] == (row["text"], label)
        at += 1
        if at < len(found) and found[at][0] not in {other["text"] for other in ROWS}:
            copy, of = found[at]
            assert of == label and len(copy) == len(row["text"]), "KeyboardAug replaces characters and keeps the length"
            assert sum(a != b for a, b in zip(copy, row["text"], strict=True)) >= 1
            at += 1
    assert at == len(found)
    assert prepared.validation is not None and prepared.validation.ledger["augmented"] == 0
    identity = augment_identity(config, "train")
    assert identity is not None and identity["nlpaug"] == importlib.metadata.version("nlpaug")


def test_the_copies_are_nlpaugs_own_from_a_seed_of_the_row(make: Any) -> None:
    """Calling nlpaug directly with the documented seed gives the same text."""
    (copy,) = Augmenter(make(KEYBOARD).data.augment, seed=3).copies({"text": TEXTS[0]}, 5, "here")
    seed = int(np.random.SeedSequence((3, 5, 0, 0)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    assert copy == {"text": KeyboardAug(aug_char_p=0.2).augment(TEXTS[0])[0]} != {"text": TEXTS[0]}


@pytest.mark.parametrize("name", MODULES)
def test_every_augmenter_changes_texts(name: str, make: Any) -> None:
    augmenter = Augmenter(make({"name": name, "columns": ["text"]}).data.augment, seed=0)
    texts = TEXTS * 3
    copies = [copy for n, text in enumerate(texts) for copy in augmenter.copies({"text": text}, n, "here")]
    assert sum(copy is not None for copy in copies) > len(texts) / 2


def test_every_augmenter_of_the_schema_is_in_the_table() -> None:
    assert set(MODULES) == set(get_args(AugmentConfig.model_fields["name"].annotation))


@pytest.mark.slow
def test_another_process_makes_the_same_rows(make: Any, tmp_path: Path, root: Path) -> None:
    config = make(KEYBOARD)
    first = Path(prepare(config).train.table)
    plan = make_plan(
        make(KEYBOARD, data={"cache_dir": str(tmp_path / "other")}), nodes=1, workers_per_node=1, origins={}
    )
    write_plan(plan)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "dist_ft.prepare", str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    second = tmp_path / "other" / "data" / first.name
    files = sorted(file.name for file in first.iterdir() if file.is_file())
    assert files == sorted(file.name for file in second.iterdir() if file.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_a_row_has_the_same_copy_in_a_subset_and_held_out_rows_have_none(make: Any, tiny_llama: Path) -> None:
    whole = dict(enumerate(decoded(prepare(make(own("drawn"))).train, tiny_llama)))
    few = make(own("drawn"), data={"k_shot": 2})
    rows = choose(few, "train").rows.tolist()
    found = decoded(prepare(few).train, tiny_llama)
    assert found == [whole[2 * row + add] for row in rows for add in (0, 1)] and len(found) == 8
    folds = prepare(make(own("drawn"), data={"folds": 3, "validation": None}))
    assert folds.train.ledger["rows_kept"] == 16 and folds.validation.ledger["rows_kept"] == 4
    assert {text for text, _ in decoded(folds.validation, tiny_llama)} < {row["text"] for row in ROWS}


def test_copies_differ_and_generators_go_on_as_if_nothing_had_been(make: Any, tiny_llama: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    augmenter = Augmenter(make(own("drawn", copies=3)).data.augment, seed=0)
    copies = [augmenter.copies({"text": "a"}, number, "here") for number in (0, 0, 1)]
    texts = [[copy["text"] for copy in made if copy] for made in copies]
    assert (random.random(), np.random.rand()) == expected
    assert texts[0] == texts[1] and len({*texts[0], *texts[2]}) == 6
    other = Augmenter(make(own("drawn")).data.augment, seed=1).copies({"text": "a"}, 0, "here")
    assert next(other)["text"] not in texts[0]


def test_what_came_out_unchanged_or_twice_is_counted_and_not_added(make: Any) -> None:
    assert prepare(make(own("same", copies=2))).train.ledger["unchanged"] == 24
    ledger = prepare(make(own("several", copies=2))).train.ledger
    assert (ledger["augmented"], ledger["unchanged"], ledger["rows_kept"]) == (12, 12, 24)


def test_words_are_changed_one_by_one_so_that_tags_stay_where_they_are(make: Any, tiny_llama: Path) -> None:
    rows = [{"tokens": ["Ada", "lives", "in", "Lund"], "tags": ["B-p", "O", "O", "B-l"]}] * 2
    task = {"name": "token_classification"}
    table = prepare(make(own("letter", "tokens"), rows, task=task)).train.open_table()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    one, other = table.example(0), table.example(1)
    assert "".join(tokenizer.decode(other["input_ids"]).split()) == "adAsevilnidnuL"
    assert other["tags"].tolist() == one["tags"].tolist()
    assert prepare(make(own("longer", "tokens"), rows, task=task)).train.ledger["unchanged"] == 2


def test_of_a_conversation_what_the_user_says_is_changed(make: Any, tiny_llama: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}] * 2
    train = prepare(make(own("loud", "messages"), rows, task={"name": "instruction", "packing": False})).train
    texts = [text for text, _ in decoded(train, tiny_llama)]
    assert texts[1] == texts[0].replace("hello", "HELLO!") != texts[0]


def test_a_copy_that_cannot_be_learned_from_is_left_out_and_told(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(own("nothing"), task={"name": "causal_lm", "packing": False})
    ledger = prepare(config).train.ledger
    assert ledger["rows_kept"] == ledger["rows_read"] == 12 and ledger["augmented"] == 0
    (tally,) = ledger["copies_left_out"].values()
    assert tally["rows"] == 12
    long = make(own("long"))
    (cause,) = prepare(long).train.ledger["copies_left_out"]
    assert "longer than task.max_length" in cause


def test_each_set_of_a_mixture_has_its_own_and_counts_are_told(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(None)
    rows = str(tmp_path / "rows.jsonl")
    config = make(None, data={"mixture": {"a": {"train": rows, "augment": own("loud")}, "b": {"train": rows}}})
    prepared = prepare(config)
    assert {name: part.ledger["rows_kept"] for name, part in prepared.train.parts.items()} == {"a": 24, "b": 12}
    assert prepared.train.ledger["augmented"] == 12
    card = render_card(make_plan(config, nodes=1, workers_per_node=1, origins={}), prepared, before={}, after={})
    assert "12 of 12 + 12 augmented" in card
    for table in ledger_tables(config, prepared.train, "train"):
        view.Console().print(table)
    assert "rows augmented" in capsys.readouterr().out
    path = write_plan(make_plan(make(own("loud")), nodes=1, workers_per_node=1, origins={}))
    assert view.main([str(path), "rows=1"]) == 0
    assert "THE INVOICE IS WRONG 0!" in capsys.readouterr().out.replace("▁", " ")


def test_what_copies_depend_on_is_in_the_name_of_what_is_prepared(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(own("loud"))
    prepare(base)
    others = [
        make(None),
        make({**own("loud"), "name": "OcrAug"}),
        make(own("drawn")),
        make(own("loud", copies=2)),
        make(own("loud"), train={"seed": 1}),
    ]
    names = {split_folder(config, "train") for config in (base, *others)}
    assert len(names) == 6
    assert split_folder(make(own("loud"), launch={"workers_per_node": 4}), "train") == split_folder(base, "train")
    lines = {"name": "causal_lm"}
    validation = split_folder(make(None, task=lines), "validation")
    assert split_folder(make(own("loud"), task=lines), "validation") == validation
    assert is_prepared(base)
    monkeypatch.setattr(augment_rules.importlib.metadata, "version", lambda name: "0.0")
    assert not is_prepared(base)


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        ({**KEYBOARD, "options": {"aug_chra_p": 0.2}}, "does not accept these options"),
        (own("broken"), "failed at"),
        (own("loud", "text_pair"), "no row has text_pair"),
    ],
)
def test_what_is_wrong_is_named(make: Any, augment: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        prepare(make(augment))


@pytest.mark.parametrize(
    ("augment", "changes", "said"),
    [
        (own("loud", "context"), {"task": {"name": "question_answering"}}, "positions in the context"),
        (own("loud", "tags"), {"task": {"name": "token_classification"}}, "tags are the training target"),
        (own("loud", "label"), {}, "labels are the training target"),
        (own("loud", "txet"), {}, "use one of text, text_pair"),
        (own("loud", "text", "text"), {}, "more than once"),
        (own("loud", "text"), {"task": {"name": "causal_lm"}, "data": {"format": "tokens"}}, "no text to augment"),
        (own("loud"), {"privacy": {"noise_multiplier": 1.0}}, "several samples"),
    ],
)
def test_what_must_not_change_is_refused_before_data_is_read(make: Any, augment: Any, changes: Any, said: str) -> None:
    problems = list(augment_problems(make(augment, **changes)))
    assert len(problems) == 1 and said in str(problems[0])
    assert problems[0] in check(make(augment, **changes))


def test_what_is_missing_is_told_at_launch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_machine(make(KEYBOARD)) == []
    monkeypatch.setattr(augment_rules, "find_spec", lambda name: None)
    (problem,) = check_machine(make(KEYBOARD))
    assert problem.where == "data.augment" and "dist-ft[augment]" in problem.way_out
    with pytest.raises(MachineError, match="nlpaug"):
        prepare(make(KEYBOARD))


def test_keys_are_known_and_a_mixture_has_its_own(make: Any, tmp_path: Path) -> None:
    make(None)
    words = ["data=jsonl", f"data.train={tmp_path}/rows.jsonl", "task=sequence_classification"]
    augmented = [*words, "data.augment.name=KeyboardAug", "data.augment.columns=[text]"]
    composed = compose([*augmented, "data.augment.options={aug_char_p: 0.2}"])
    assert composed.config.data.augment == make(KEYBOARD).data.augment
    for wrong, said in (
        ("data.augment.optoins={a: 1}", r"did you mean data\.augment\.options\?"),
        ("data.augment.copies=0", r"data\.augment\.copies \(command line\): 0 is invalid"),
        ("data.augment.name=os.system", r"data\.augment\.name"),
    ):
        with pytest.raises(RequestError, match=said):
            compose([*augmented[: -1 if "name=" in wrong else None], "data.augment.columns=[text]", wrong])
    beside = ["data=mixture", f"data.mixture.a.train={tmp_path}/rows.jsonl", *augmented[2:]]
    composed = compose(beside)
    assert "data.mixture.NAME.augment" in str(check(composed.config, composed.origins))
