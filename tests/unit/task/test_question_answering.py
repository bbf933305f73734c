"""Question answering: chunks against those of the tokenizer, loss against transformers, spans against brute force."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ft.assess.scoring import evaluate_model
from dist_ft.config.run import RunConfig
from dist_ft.config.task import QuestionAnsweringConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.errors import RequestError
from dist_ft.inspect.rows import describe_sequence, find_targets
from dist_ft.prepare import Prepared, prepare
from dist_ft.state import Facts, Sample
from dist_ft.task.question_answering import QuestionAnswering
from dist_ft.task.table import TASKS
from dist_ft.testing import tiny
from tests.samples import question_row as row

LONG = "Ada wrote notes. " * 12 + "She met Åsa från Örebro in 東京 😀 yesterday"
ARABIC = "وصل محمد إلى القاهرة أمس مع أصدقائه من بيروت"


ROWS = [
    row("Ada Lovelace lived in London.", "Who?", "Ada Lovelace"),
    row(LONG, " Where was Åsa?", "東京 😀"),
    row(LONG, "When?", "yesterday"),  # the last word of the context
    row(ARABIC, "من أين؟", "بيروت"),
    row("a  b\n\nc ", "b?", "b"),
    row("Ada Lovelace lived in London.", "Who?", "Ada Lovelace"),  # same as the first row
]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """BERT tokenizer with a vocabulary of letters and a few words, so that most words have several tokens."""
    from transformers import AutoTokenizer, BertTokenizerFast

    text = "".join(given["context"] + given["question"] for given in ROWS).lower()
    letters = sorted({letter for letter in text + "åäöabcdefghijklmnopqrstuvwxyz" if letter.strip()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wrote", "ada", *letters, *(f"##{c}" for c in letters)]
    folder = tmp_path_factory.mktemp("wordpiece")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bert(wordpiece: Any) -> Any:
    head = "AutoModelForQuestionAnswering"
    return tiny.build("bert", head, vocab_size=len(wordpiece), initializer_range=0.5).eval()


def build(has_token_types: bool = True, **keys: Any) -> QuestionAnswering:
    config = QuestionAnsweringConfig(name="question_answering", **{"max_length": 48, "doc_stride": 10, **keys})
    return QuestionAnswering(config, Facts(has_token_types=has_token_types))


def encode(task: QuestionAnswering, tokenizer: Any, given: dict[str, Any]) -> list[Any]:
    return list(task.encode(given, SimpleNamespace(tokenizer=tokenizer)))


def batch_of(task: QuestionAnswering, pieces: list[Any]) -> Any:
    import numpy as np

    columns = [
        {**{name: np.array(values) for name, values in piece.items()}, "origin": np.array([0])} for piece in pieces
    ]
    return task.collate([Sample([piece], i) for i, piece in enumerate(columns)])


def recipe(tokenizer: Any, given: dict[str, Any], length: int, stride: int) -> list[dict[str, Any]]:
    """Features as in `run_qa.py` of transformers: chunks by the tokenizer, and labels from character offsets."""
    encoded = tokenizer(
        given["question"].strip(),
        given["context"],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    text, start = given["answers"]["text"][0], given["answers"]["answer_start"][0]
    features = []
    for i, offsets in enumerate(encoded["offset_mapping"]):
        context = [place for place, side in enumerate(encoded.sequence_ids(i)) if side == 1]
        answer = [p for p in context if offsets[p][0] < start + len(text) and offsets[p][1] > start]
        whole = answer and offsets[answer[0]][0] <= start and offsets[answer[-1]][1] >= start + len(text)
        features.append(
            {
                "input_ids": encoded["input_ids"][i],
                "span": [answer[0], answer[-1]] if whole else [0, 0],
                "characters": [offsets[place] for place in context],
            }
        )
    return features


@pytest.mark.parametrize("given", ROWS[:5], ids=["short", "non-ASCII", "at the end", "right to left", "blanks"])
@pytest.mark.parametrize(("length", "stride"), [(48, 10), (40, 0), (512, 128)])
def test_pieces_are_those_of_the_tokenizer(given: dict[str, Any], length: int, stride: int, wordpiece: Any) -> None:
    task = build(max_length=length, doc_stride=stride)
    pieces, features = encode(task, wordpiece, given), recipe(wordpiece, given, length, stride)
    assert [piece["input_ids"] for piece in pieces] == [feature["input_ids"] for feature in features]
    assert [piece["span"] for piece in pieces] == [feature["span"] for feature in features]
    assert stride == 0 or any(piece["span"] != [0, 0] for piece in pieces)  # a cut may split the answer with stride 0
    for piece, feature in zip(pieces, features, strict=True):
        pairs = zip(piece["begins"], piece["ends"], strict=True)
        assert [pair for pair in pairs if pair[0] >= 0] == feature["characters"]
        assert len(piece["token_type_ids"]) == len(piece["input_ids"]) <= length
    covered = {
        place for piece in pieces for b, e in zip(piece["begins"], piece["ends"], strict=True) for place in range(b, e)
    }
    context = given["context"]
    assert {place for place, letter in enumerate(context) if letter.strip()} <= covered


@pytest.mark.parametrize("given", ROWS, ids=range(len(ROWS)))
def test_byte_level_tokens_give_back_the_answer(given: dict[str, Any], tiny_tokenizer: Path) -> None:
    """Byte-level tokens contain whitespace and partial characters; without CLS, the null position is token 0."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    found = []
    for piece in encode(build(has_token_types=False, max_length=96), tokenizer, given):
        assert piece["null"] == [0]
        first, last = piece["span"]
        if first > 0:
            found.append(given["context"][piece["begins"][first] : piece["ends"][last]])
            whole = tokenizer.decode(piece["input_ids"][first : last + 1])
            assert whole.strip() == given["answers"]["text"][0]
    assert found and set(found) == {given["answers"]["text"][0]}


def test_loss_is_that_of_transformers(wordpiece: Any, bert: Any) -> None:
    """Chunks of equal length are compared, because the loss of transformers includes padding, unlike this one."""
    task = build()
    pieces = [piece for given in ROWS for piece in encode(task, wordpiece, given)]
    alike = [piece for piece in pieces if len(piece["input_ids"]) == 48]
    assert len(alike) > 3 and len({len(piece["input_ids"]) for piece in pieces}) > 2
    with torch.no_grad():
        batch = batch_of(task, alike)
        starts, ends = batch.targets.unbind(dim=1)
        found = task.loss(bert, batch)
        torch.testing.assert_close(
            found.loss / found.weight, bert(**batch.inputs, start_positions=starts, end_positions=ends).loss
        )
        assert float(found.weight) == batch.supervised == len(alike)
        together = task.loss(bert, batch_of(task, pieces))
        alone = sum(task.loss(bert, batch_of(task, [piece])).loss for piece in pieces)
        torch.testing.assert_close(together.loss, alone)
        nothing = batch.without_targets()
        assert task.loss(bert, nothing).loss == 0 and task.score(bert, nothing).predictions == []


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (row("a b", "?"), "no answer"),
        (row("a b", "?", ("z", 0)), "does not occur in the context"),
        (row("a b", "  ", "b"), "question is empty"),
        (row(" \n", "?", ("b", 0)), "context is empty"),
        (row("\u200b\u200b", "?", "\u200b"), "the context has no tokens"),
        (row("a \u200b b", "?", "\u200b"), "the answer has no tokens"),
        (row("a b", "why " * 60, "b"), "the question is too long"),
        (row("a b " * 60, "why " * 12, "b"), "the question is too long"),
    ],
)
def test_rows_with_nothing_to_learn_are_faults(given: dict[str, Any], cause: str, wordpiece: Any) -> None:
    with pytest.raises(RowFault, match=cause):
        encode(build(), wordpiece, given)


def test_a_question_as_long_as_a_piece_is_no_fault_where_the_context_fits(wordpiece: Any) -> None:
    (piece,) = encode(build(), wordpiece, row("a b", "b " * 43, "b"))
    assert len(piece["input_ids"]) == 48 and piece["span"] == [46, 46]


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(RequestError, match="provides no character offsets"):
        encode(build(), SimpleNamespace(is_fast=False), ROWS[0])


def test_without_an_answer_the_null_place_is_learned(wordpiece: Any) -> None:
    pieces = encode(build(null_score_diff_threshold=0.0), wordpiece, row(LONG, "?"))
    assert len(pieces) > 2 and {tuple(piece["span"]) for piece in pieces} == {(0, 0)}


def test_a_null_place_behind_the_context_moves_with_its_end() -> None:
    """XLNet has its CLS token at the end; a CLS token in the text itself is not the null position."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<sep>": 0, "<cls>": 1, "a": 2, "b": 3, "?": 4}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="$A <sep> <cls>", pair="$A <sep> $B <sep> <cls>", special_tokens=[("<sep>", 0), ("<cls>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="<cls>", sep_token="<sep>", unk_token="a")
    pieces = encode(build(False, max_length=8, doc_stride=1), tokenizer, row("a <cls> a a b a", "?", "b"))
    for piece in pieces:
        assert piece["null"] == [len(piece["input_ids"]) - 1] and piece["input_ids"][piece["null"][0]] == 1
    assert [piece["span"] for piece in pieces] == [[7, 7], [3, 3]]
    assert [piece["input_ids"] for piece in pieces] == [[4, 0, 2, 1, 2, 2, 0, 1], [4, 0, 2, 3, 2, 0, 1]]


def settings(folder: Path, model: str, rows: list[dict[str, Any]], **task: Any) -> RunConfig:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(given) + "\n" for given in rows), encoding="utf-8")
    content: dict[str, Any] = {
        "run_name": "t",
        "output_dir": str(folder / "run"),
        "model": {"dtype": "float32", "name_or_path": model},
        "task": {"name": "question_answering", "max_length": 48, "doc_stride": 10, **task},
        "data": {"train": str(source), "validation": str(source), "cache_dir": str(folder / "cache")},
        "method": {"name": "full"},
        "engine": {"name": "ddp"},
        "optim": {},
        "train": {"global_batch_size": 1, "per_device_train_batch_size": 1},
        "track": {},
        "launch": {"name": "local", "workers_per_node": 1},
    }
    return RunConfig.model_validate(content)


@pytest.fixture(scope="module")
def prepared(wordpiece: Any, bert: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Prepared]:
    folder = tmp_path_factory.mktemp("prepared")
    bert.save_pretrained(folder / "model")
    wordpiece.save_pretrained(folder / "model")
    rows = [*ROWS, row("a b", "?", ("z", 0)), row("", "?", ("z", 0)), row("Ada wrote", "Who met?")]
    config = settings(folder, str(folder / "model"), rows, unsupervised="drop", null_score_diff_threshold=0.0)
    return config, prepare(config)


def test_rows_are_counted_by_what_became_of_them(prepared: tuple[RunConfig, Prepared]) -> None:
    ledger = prepared[1].train.ledger
    assert (ledger["rows_read"], ledger["rows_kept"]) == (9, 7)
    assert {cause: tally["rows"] for cause, tally in ledger["dropped"].items()} == {
        "the answer does not occur in the context": 1,
        "the context is empty": 1,
    }
    assert ledger["samples"] == ledger["supervised_tokens"] > ledger["rows_kept"]


def test_a_fault_names_its_place(wordpiece: Any, bert: Any, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path / "model")
    wordpiece.save_pretrained(tmp_path / "model")
    rows = [ROWS[0], row("a b", "?", ("z", 0)), row("a b", "?")]
    with pytest.raises(RequestError) as caught:
        prepare(settings(tmp_path, str(tmp_path / "model"), rows))
    assert "1 because the answer does not occur in the context, first at" in str(caught.value)
    assert "rows.jsonl:3" in str(caught.value) and "task.null_score_diff_threshold=0.0" in str(caught.value)


def test_every_batch_size_gives_the_same_answers(prepared: tuple[RunConfig, Prepared], bert: Any) -> None:
    config, data = prepared
    assert data.validation is not None
    task = QuestionAnswering(config.task, data.facts)  # type: ignore[arg-type]
    one, *others = (evaluate_model(bert, task, data.validation, size) for size in (1, 3, 50))
    assert [found["sample"] for found in one.predictions] == list(range(7))
    assert len({found["prediction"] for found in one.predictions}) > 3  # otherwise the comparison below proves nothing
    same = [one.predictions[0][key] for key in ("prediction", "start")]
    assert [one.predictions[5][key] for key in ("prediction", "start")] == same  # row 5 is the same as row 0
    for found, given in zip(one.predictions, [*ROWS, row("Ada wrote", "")], strict=True):
        if found["start"] is not None:
            assert given["context"].startswith(found["prediction"], found["start"]) and found["prediction"].strip()
    for other in others:
        assert other.metrics == pytest.approx(one.metrics, rel=1e-5)
        for mine, theirs in zip(one.predictions, other.predictions, strict=True):
            assert mine == {**theirs, **{k: pytest.approx(theirs[k], rel=1e-4) for k in ("score", "null_score_diff")}}


def test_a_trained_head_answers(prepared: tuple[RunConfig, Prepared], bert: Any) -> None:
    """A model that is overfitted to the labels of the chunks answers every row correctly."""
    import copy

    config, data = prepared
    task, model = QuestionAnswering(config.task, data.facts), copy.deepcopy(bert)  # type: ignore[arg-type]
    assert data.validation is not None
    table = data.validation.open_table()
    batch = task.collate([Sample([table.example(i)], i) for i in range(len(table))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(model, batch).loss.backward()
        optimizer.step()
    found = evaluate_model(model, task, data.validation, 4)
    assert found.metrics["exact_match"] == found.metrics["f1"] == found.metrics["exact_match_unanswerable"] == 1.0


def test_an_adapter_reads_which_text_a_token_is_of(wordpiece: Any, bert: Any) -> None:
    """The model with an adapter has the same loss as the merged model."""
    import copy

    import peft

    from dist_ft.method.through_peft import task_type_of

    kind = task_type_of(bert)
    adapted = peft.get_peft_model(copy.deepcopy(bert), peft.LoraConfig(task_type=kind, init_lora_weights=False)).eval()
    task = build()
    batch = batch_of(task, encode(task, wordpiece, ROWS[0]))
    with torch.no_grad():
        before = task.loss(adapted, batch).loss
        merged = task.loss(adapted.merge_and_unload(), batch).loss
    torch.testing.assert_close(before, merged)


def test_view_shows_the_answer(wordpiece: Any) -> None:
    *without, piece = encode(build(), wordpiece, ROWS[2])
    first, last = piece["span"]
    assert describe_sequence(piece, Facts()).endswith(f"tokens, answer in tokens {first} to {last}")
    assert {describe_sequence(other, Facts()) for other in without} == {"48 tokens, no answer"}
    assert [i for i, is_target in enumerate(find_targets(piece)) if is_target] == list(range(first, last + 1))
    assert not any(find_targets(without[0])) and not any(find_targets({"input_ids": [1, 2]}))


def test_a_decoder_of_language_keeps_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    """The question answering model class names the base model differently; its weights are loaded all the same."""
    from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering

    from dist_ft.config.model import ModelConfig
    from dist_ft.export.opened import open_base
    from dist_ft.method.shards import to_file_names
    from dist_ft.model.load import attention_of, load_model, rename_base

    config, architecture = ModelConfig(name_or_path=str(tiny_llama), dtype="float32"), build().architecture(None, None)  # type: ignore[arg-type]
    attention = attention_of(config, str(tiny_llama), torch.device("cpu"), architecture)
    model: Any = load_model(config, str(tiny_llama), attention, architecture, weights=True).model
    wanted = AutoModelForCausalLM.from_pretrained(tiny_llama).model.state_dict()
    for found in (model, open_base(config, str(tiny_llama), architecture)):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.transformer.state_dict().items())
    files = {name for name, _ in to_file_names(model, model.named_parameters())}
    assert files == {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path)
    again, report = AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and torch.equal(again.qa_outputs.weight, model.qa_outputs.weight)
    language = TASKS["causal_lm"].architecture(None, Facts())
    assert rename_base(config, str(tiny_llama), language) == {} != rename_base(config, str(tiny_llama), architecture)
