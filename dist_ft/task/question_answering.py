"""Answers that stand in a text, by their first and last token; long texts are read in overlapping pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import QuestionAnsweringConfig
from ..data.read.faults import RowFault
from ..errors import RequestError
from ..state import ORIGIN, Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Prediction, Row, Sample, Task
from .batches.answer_spans import Span, answer_rows, cut_pieces, find_answer, find_tokens, rank_spans

if TYPE_CHECKING:
    from torch import Tensor, nn


BEGINS, ENDS = "begins", "ends"  # token columns: characters of the context that a token stands for, -1 of other tokens
SPAN = "span"  # row column: first and last token of the answer; the null place twice where the piece has none
NULL = "null"  # row column: the place that stands for no answer


@dataclass(frozen=True)
class PieceBatch(Batch):
    """A micro-batch that knows where its tokens stand in their contexts."""

    begins: Tensor | None = None  # [B, T] int64, of the context's tokens; -1 elsewhere
    ends: Tensor | None = None
    nulls: tuple[int, ...] = ()
    origins: tuple[int, ...] = ()  # which of the split's rows each piece is of


class QuestionAnswering(Task):
    """The task `question_answering`: each piece of a row is a sample of its own, and metrics join a row's pieces.

    A piece is the whole question and as much of the context as fits. Where it does not hold the answer, the null place
    is to be predicted: the tokenizer's CLS token, or the first token where there is none.

    Args:
        config: the task's keys.
        facts: of the tokenizer: padding, token types.
        padding_free: not possible here.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: QuestionAnsweringConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts

    @staticmethod
    def architecture(config: QuestionAnsweringConfig, facts: Facts) -> Architecture:
        """A head with two outputs a token, for the first and the last one; a base may have had other labels."""
        return Architecture("AutoModelForQuestionAnswering", {"num_labels": 2}, new_head=True)

    @property
    def layout(self) -> Layout:
        """Each piece is a sequence with the characters of its tokens."""
        from .batches.padded import input_columns

        return Layout(
            {"max_length": self.config.max_length},
            (*input_columns(self.facts), BEGINS, ENDS),
            (SPAN, NULL, ORIGIN),
            kept=("id", "context", "question", "answers"),
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The row's pieces, none longer than `max_length`.

        Raises:
            RequestError: the tokenizer does not tell where a token stands in the text.
            RowFault: question or context are empty, the answer is not in the context or not given, or the question
                leaves too little room.
        """
        fast = tokenizer.tokenizer
        if not fast.is_fast:
            rule = "a slow tokenizer does not tell where in the text a token stands"
            raise RequestError.of("model.tokenizer", rule, "set model.tokenizer to one with a tokenizer.json")
        question, context = row["question"].strip(), row["context"]
        for name, text in (("question", question), ("context", context.strip())):
            if not text:
                raise RowFault(f"the {name} is empty", "leave such rows out")
        answer = self._find_answer(row)
        encoded = fast(question, context, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        return self._cut(encoded, context, answer, fast.cls_token_id)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The same: pieces are never too long."""
        return self.encode(row, tokenizer)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """[samples]: each piece is one example."""
        return np.ones(len(samples), dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Padded pieces; targets [B, 2]: places of the answer's first and last token."""
        import torch

        from .batches.padded import only_segments, pad_inputs, pad_rows

        segments = only_segments(samples)
        inputs = pad_inputs(segments, self.facts)
        places = torch.arange(len(segments))
        return PieceBatch(
            inputs,
            torch.tensor([segment[SPAN].tolist() for segment in segments]),
            places,
            places,
            tokens=int(inputs["attention_mask"].sum()),
            samples=tuple(sample.index for sample in samples),
            begins=pad_rows([segment[BEGINS] for segment in segments], -1),
            ends=pad_rows([segment[ENDS] for segment in segments], -1),
            nulls=tuple(int(segment[NULL][0]) for segment in segments),
            origins=tuple(int(segment[ORIGIN][0]) for segment in segments),
        )

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sum over pieces of the mean of two cross-entropies, that of the first and that of the last token's place."""
        return _loss(_logits(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss with each piece's best spans."""
        from dataclasses import replace

        assert isinstance(batch, PieceBatch) and batch.begins is not None and batch.ends is not None
        logits = _logits(model, batch)
        starts, ends = logits.detach().cpu().unbind(dim=1)
        kept = slice(len(batch.samples))  # no samples without targets
        allowed = batch.begins[kept] >= 0
        ranked = rank_spans(starts, ends, allowed, self.config.max_answer_length, self.config.n_best)
        begins, stops = batch.begins.tolist(), batch.ends.tolist()
        predictions = []
        for i, (sample, spans) in enumerate(zip(batch.samples, ranked, strict=True)):
            found = [(begins[i][first], stops[i][last], value) for first, last, value in spans]
            null = float(starts[i, batch.nulls[i]] + ends[i, batch.nulls[i]])
            predictions.append({"sample": sample, "origin": batch.origins[i], "spans": found, "null": null})
        return replace(_loss(logits, batch), predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """loss, exact_match, f1; see answer_scores.py."""
        from .scores.answers import measure

        return {"loss": float(totals.loss) / float(totals.weight)} | measure(self.by_row(totals, rows))

    def by_row(self, totals: LossSum, rows: Sequence[Row]) -> Sequence[Prediction]:
        """One answer a row, from those of all its pieces."""
        return answer_rows(totals.predictions, rows, self.config.n_best, self.config.null_score_diff_threshold)

    def _find_answer(self, row: Row) -> Span | None:
        """Characters of the answer; None where the row is known to have none."""
        if not row["answers"]["text"]:
            if self.config.null_score_diff_threshold is None:
                way_out = "set task.null_score_diff_threshold=0.0, with which nothing can be the answer"
                raise RowFault("it has no answer", way_out)
            return None
        if (answer := find_answer(row["context"], row["answers"])) is None:
            raise RowFault("its answer does not stand in its context", "correct the answer's text")
        return answer

    def _cut(self, encoded: Any, context: str, answer: Span | None, cls_id: int | None) -> list[Example]:
        """The pieces of a row whose question and context are `encoded` as a pair."""
        from .batches.padded import input_columns

        ids, sides = encoded["input_ids"], encoded.sequence_ids(0)
        inside = [place for place, side in enumerate(sides) if side == 1]
        first, count = (inside[0], len(inside)) if inside else (0, 0)
        stop = first + count
        offsets = [_trim(context, *pair) for pair in encoded["offset_mapping"][first:stop]]
        if all(begin < 0 for begin, _ in offsets):
            raise RowFault("no word of the context has a token", "leave such rows out")
        begins, ends = np.array(offsets).T
        found = None if answer is None else find_tokens(begins, ends, answer)
        if answer is not None and found is None:
            raise RowFault("no token of the context has its answer", "leave such rows out")
        room = self.config.max_length - (len(ids) - count)
        if room < count and room <= self.config.doc_stride:
            rule = "the question leaves room for no more of the context than pieces share (task.doc_stride)"
            raise RowFault(rule, "raise task.max_length, or lower task.doc_stride")
        null = next((place for place, side in enumerate(sides) if side is None and ids[place] == cls_id), 0)
        columns = {name: list(encoded[name]) for name in input_columns(self.facts)}
        columns |= {
            name: [-1] * first + values.tolist() + [-1] * (len(ids) - stop)
            for name, values in ((BEGINS, begins), (ENDS, ends))
        }
        pieces: list[Example] = []
        for begin, end in cut_pieces(count, room, self.config.doc_stride):
            taken = {n: v[:first] + v[first + begin : first + end] + v[stop:] for n, v in columns.items()}
            at = null if null < first else null - count + end - begin
            held = found is not None and begin <= found[0] and found[1] < end
            span = [first + place - begin for place in found] if found and held else [at, at]
            pieces.append({**taken, SPAN: span, NULL: [at]})
        return pieces


def _trim(context: str, begin: int, end: int) -> Span:
    """A token's characters without blanks at their ends, which byte-level tokenizers count to it; -1 if none is left.

    So an answer neither begins nor ends with a blank.
    """
    text = context[begin:end]
    bare = text.strip()
    at = begin + len(text) - len(text.lstrip())
    return (at, at + len(bare)) if bare else (-1, -1)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """[n, 2, T] float32: of first and last tokens; -inf at padding, so that a loss depends on no neighbour's length."""
    import torch

    output = model(**batch.inputs)
    mask = batch.inputs["attention_mask"]
    both = torch.stack([output.start_logits, output.end_logits], dim=1)
    both = both[..., -mask.shape[1] :].float()  # a method may have put virtual tokens in front
    return both.masked_fill(mask[:, None] == 0, float("-inf"))[batch.positions]


def _loss(logits: Tensor, batch: Batch) -> LossSum:
    from torch.nn import functional

    both = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    losses = both.view(-1, 2).sum(dim=1) / 2
    return LossSum(losses.sum(), losses.new_tensor(batch.loss_weight), losses=losses)
