"""Sequence-to-sequence: the loss against transformers, and the metrics against rouge-score and sacrebleu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
)

from dist_ft.config.task import Seq2SeqConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.state import Facts, Sample
from dist_ft.task.scores.texts import measure
from dist_ft.task.seq2seq import Seq2Seq
from dist_ft.testing import tiny

SOURCES = ([5, 6, 7, 1], [8, 1])
TARGETS = ([9, 1], [10, 11, 12, 1])


def make(**keys: Any) -> Seq2Seq:
    config = Seq2SeqConfig(name="seq2seq", **keys)
    return Seq2Seq(config, Facts(pad_id=0, decoder_start_id=3))


def make_model(kind: str) -> Any:
    ends = {"eos_token_id": 1, "decoder_start_token_id": 3}
    ends |= {"bos_token_id": 2, "forced_eos_token_id": 1} if kind == "bart" else {}
    return tiny.build(kind, vocab_size=20, **ends).eval()


def make_batch(task: Seq2Seq) -> Any:
    rows = zip(SOURCES, TARGETS, strict=True)
    return task.collate([Sample([{"input_ids": np.array(ids)} for ids in row], i) for i, row in enumerate(rows)])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_loss_is_that_of_transformers(kind: str) -> None:
    task, model = make(), make_model(kind)
    batch = make_batch(task)
    labels = torch.tensor([[9, 1, -100, -100], [10, 11, 12, 1]])
    with torch.no_grad():
        own = task.loss(model, batch)
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(own.loss / own.weight, expected)
    assert own.weight == 6


class Words:
    """Word-level tokenizer that appends EOS."""

    def __init__(self) -> None:
        words = ["<pad>", "</s>", "<unk>", "en", "två", "猫", "tre"]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def test_truncation_keeps_eos_and_rows_may_be_of_any_script() -> None:
    task = make(max_length=3, max_target_length=2, source_prefix="tre ")
    row = {"source": "en två 猫", "target": "猫 två"}
    assert task.encode(row, Words()) == [{"input_ids": [6, 3, 4, 5, 1]}, {"input_ids": [5, 4, 1]}]
    assert task.truncate(row, Words()) == [{"input_ids": [6, 3, 1]}, {"input_ids": [5, 1]}]
    with pytest.raises(RowFault):
        task.encode({"source": "en", "target": " "}, Words())


def test_scores_are_the_libraries() -> None:
    texts, given = ["the cat sat down here", "a dog"], [["the cat sat here", "the cat sat down"], ["a big dog"]]
    found = measure(texts, given, ["rouge", "bleu", "chrf", "exact_match"])
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(one, text)["rougeL"].fmeasure for one in many) for text, many in zip(texts, given, strict=True)
    ]
    assert found["rougeL"] == pytest.approx(sum(best) / 2)
    columns = [["the cat sat here", "a big dog"], ["the cat sat down", None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, columns).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score)
    assert found["exact_match"] == 0
