"""Tests of `dist-ft generate` for tasks that do not generate free text, against transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, pipeline

from dist_ft.assess import evaluate, generate
from dist_ft.config.plan import Plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.errors import RequestError
from dist_ft.families import architecture_of
from dist_ft.prepare import prepare
from dist_ft.testing.words import WORDS, save_model
from tests.samples import write_labelled_rows

TEXT = "w1 w20 w30"
TAGGED = [{"tokens": ["w1", "w2", "w3"], "tags": ["B-PER", "I-PER", "O"]}, {"tokens": ["w4"], "tags": ["B-LOC"]}]
SPEECH = [{"tokens": ["w1", "w2", "w3"], "tags": ["NOUN", "VERB", "ADJ"]}]
PAIRS = [{"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}]
CONTEXT = " ".join(WORDS[10:50])
ASKED = [{"question": "w1", "context": CONTEXT, "answers": {"text": ["w12"], "answer_start": [CONTEXT.find("w12")]}}]
MASKED = [{"text": "w1 w2 w3 w4"}]
SOURCES = [{"source": "w1 w2 w3", "target": "w4 w5"}]
LABELLED = "labelled"


def make_run(top: Path, base: str, task: dict[str, Any], rows: list[dict[str, Any]] | str) -> tuple[Path, Any]:
    """Create the folder of a run whose trained model has random weights; also return the model."""
    data = top / "rows.jsonl"
    if isinstance(rows, str):
        write_labelled_rows(data, 12)
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RunConfig.model_validate(
        {
            "run_name": "r",
            "output_dir": str(top / "run"),
            "model": {"dtype": "float32", "name_or_path": base},
            "task": {"max_length": 32, **task},
            "data": {"train": str(data), "validation": str(data), "cache_dir": str(top / "cache")},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"max_steps": 1, "global_batch_size": 1, "per_device_train_batch_size": 1},
            "track": {"wandb": "off"},
            "launch": {"name": "local"},
        }
    )
    write_plan(
        Plan(
            config=config, nodes=1, workers_per_node=1, world_size=1, accumulation_steps=1, git_sha="abc",
            created="2026-01-01", origins={},
        )
    )  # fmt: skip
    architecture = architecture_of(config, prepare(config).facts)
    torch.manual_seed(7)
    model = getattr(transformers, architecture.auto_class).from_pretrained(base, **architecture.overrides)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(top / "run" / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(top / "run" / "model")
    return top / "run", model.eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("bert", tmp_path_factory.mktemp("bert"))


def said(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    generate.main([str(run / "run.yaml"), *words])
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "".join(line for line in lines if "[WARNING]" not in line)  # logged by DeepSpeed, which accelerate imports


@pytest.mark.parametrize("shape", ["bert", "gpt2"])
def test_a_label_with_its_probabilities(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_model(shape, tmp_path / "base")
    run, _ = make_run(tmp_path, base, {"name": "sequence_classification"}, LABELLED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    classify = pipeline("text-classification", str(run / "model"), tokenizer=tokenizer, top_k=None)
    wanted = ", ".join(f"{found['label']} {found['score']:.1%}" for found in classify([TEXT])[0])
    assert said(capsys, run, f"prompt={TEXT}") == f"{wanted.split()[0]}  ({wanted})\n"
    shown = said(capsys, run, "prompts=validation:2")
    assert shown.count("\ntuned ") == 2 and shown.count("\ndata ") == 2


def test_several_labels_or_none(tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "w1", "label": ["a", "b"]}, {"text": "w2", "label": ["c"]}]
    run, model = make_run(tmp_path, bert, {"name": "sequence_classification", "multi_label": True}, rows)
    for bias, wanted in ((-50.0, "(none)"), (50.0, "a, b, c")):
        model.classifier.bias.data.fill_(bias)
        model.save_pretrained(run / "model")
        assert said(capsys, run, "prompt=w1").startswith(f"{wanted}  (")
    first, _, _ = said(capsys, run, "prompts=validation:1").partition("\n\n")
    assert first.splitlines()[-1].split(maxsplit=1) == ["data", "a, b"]


def test_tags_of_words(tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = make_run(tmp_path, bert, {"name": "token_classification"}, SPEECH)
    ids = AutoTokenizer.from_pretrained(bert)(TEXT, return_tensors="pt")
    names = [model.config.id2label[i] for i in model(**ids).logits[0, 1:-1].argmax(-1).tolist()]
    wanted = " ".join(f"{word}/{name}" for word, name in zip(TEXT.split(), names, strict=True))
    assert said(capsys, run, f"prompt={TEXT}") == wanted + "\n"


def test_entities(tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = make_run(tmp_path, bert, {"name": "token_classification"}, TAGGED)
    for tag, wanted in (("B-LOC", "LOC: w1; LOC: w20; LOC: w30"), ("I-PER", f"PER: {TEXT}"), ("O", "(none)")):
        model.classifier.weight.data.zero_()
        model.classifier.bias.data = torch.eye(4)[model.config.label2id[tag]]
        model.save_pretrained(run / "model")
        assert said(capsys, run, f"prompt={TEXT}") == wanted + "\n"
    shown = said(capsys, run, "prompts=validation:2").splitlines()
    assert [line.split(maxsplit=1)[1] for line in shown if line.startswith("data")] == ["PER: w1 w2", "LOC: w4"]


def test_an_answer_from_all_pieces_of_a_text(tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer equals that of an evaluation, and is the span with the highest logits over all pieces."""
    run, model = make_run(tmp_path, bert, {"name": "question_answering", "max_length": 24, "doc_stride": 6}, ASKED)
    evaluate.main([str(run / "run.yaml")])
    predicted = json.loads((run / "predictions-validation.jsonl").read_text())
    capsys.readouterr()
    prompt = json.dumps({"question": "w1", "context": CONTEXT})
    assert said(capsys, run, f"prompt={prompt}") == f"{predicted['prediction']}  ({predicted['score']:.1%})\n"
    encoded = AutoTokenizer.from_pretrained(bert)(
        "w1", CONTEXT, truncation="only_second", max_length=24, stride=6, return_overflowing_tokens=True,
        return_offsets_mapping=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    places = encoded.pop("offset_mapping")
    encoded.pop("overflow_to_sample_mapping")
    with torch.no_grad():
        output, best = model(**encoded), (float("-inf"), "")
    for piece in range(len(places)):
        inside = [i for i, side in enumerate(encoded.sequence_ids(piece)) if side == 1]
        for first in inside:
            for last in (i for i in inside if first <= i < first + 30):
                score = float(output.start_logits[piece, first] + output.end_logits[piece, last])
                best = max(best, (score, CONTEXT[places[piece, first, 0] : places[piece, last, 1]]))
    assert predicted["prediction"] == best[1]
    with pytest.raises(RequestError, match='"question": "…", "context": "…"'):
        generate.main([str(run / "run.yaml"), "prompt=w1"])


def test_the_reward_of_an_answer(tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = make_run(tmp_path, bert, {"name": "reward"}, PAIRS)
    ids = AutoTokenizer.from_pretrained(bert)("w1 w2", "w8 w9", return_tensors="pt")
    prompt = json.dumps({"prompt": "w1 w2", "answer": "w8 w9"})
    assert said(capsys, run, f"prompt={prompt}") == f"{float(model(**ids).logits):.4f}\n"
    assert "reward of: w5" in said(capsys, run, "prompts=validation:1")


def test_hidden_words(
    tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path, bert, {"name": "masked_lm", "packing": False}, MASKED)
    fill = pipeline("fill-mask", str(run / "model"), tokenizer=AutoTokenizer.from_pretrained(bert), top_k=5)
    text = "w1 [MASK] w3 [MASK]"
    wanted = [", ".join(f"{w['token_str']} {w['score']:.1%}" for w in words) for words in fill(text)]
    assert said(capsys, run, f"prompt={text}") == "\n".join(wanted) + "\n"
    assert said(capsys, run, f"prompt={text}", "model=both").count("\ntuned ") == 1, "the base model has its own head"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n\nexit\nw2 [MASK]\n"))
    assert said(capsys, run) == "\n".join(wanted) + "\n"
    with pytest.raises(RequestError, match=r"write \[MASK\] in place of a word"):
        generate.main([str(run / "run.yaml"), "prompt=w1 w2"])


def test_a_text_from_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_model("t5", tmp_path / "base", "AutoModelForSeq2SeqLM")
    task = {"name": "seq2seq", "max_target_length": 8, "source_prefix": "w7 "}
    run, model = make_run(tmp_path, base, task, SOURCES)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for words, count in (([], 8), (["max_new_tokens=3"], 3)):
        ids = tokenizer(f"w7 {TEXT}", return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=count, do_sample=False)
        wanted = tokenizer.decode(output[0], skip_special_tokens=True)
        assert wanted and said(capsys, run, f"prompt={TEXT}", *words) == wanted + "\n"


def test_what_means_nothing_is_refused(tmp_path: Path, bert: str) -> None:
    run, _ = make_run(tmp_path, bert, {"name": "sequence_classification"}, LABELLED)
    for words, told in (
        (["prompt=w1", "temperature=1"], "temperature"),
        (["prompt=w1", "max_new_tokens=3"], "max_new_tokens"),
        (["prompt=w1", "model=base"], "predicts at random"),
        (['prompt={"text": "w1", "label": "calm"}'], "requires text"),
        (["prompt="], "requires text"),
    ):
        with pytest.raises(RequestError, match=told):
            generate.main([str(run / "run.yaml"), *words])
