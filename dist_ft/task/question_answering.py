"""Extractive question answering: the answer is a span of the context, given by its first and last token.

Long contexts are split into overlapping chunks, which are called pieces in the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import QuestionAnsweringConfig
from ..data.read.faults import RowFault
from ..errors import RequestError
from ..protocols import Task
from ..state import ORIGIN, Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Prediction, Row, Sample
from .batches.answer_spans import Span, answer_rows, cut_pieces, find_answer, find_tokens, rank_spans

if TYPE_CHECKING:
    from torch import Tensor, nn


BEGINS, ENDS = "begins", "ends"  # token columns: character offsets in the context; -1 for tokens outside it
SPAN = "span"  # row column: first and last token of the answer; twice the null position if the chunk has no answer
NULL = "null"  # row column: null position, which is predicted if there is no answer


@dataclass(frozen=True)
class PieceBatch(Batch):
    """Micro-batch with the character offsets of its tokens, which turn predicted spans into text."""

    begins: Tensor | None = None  # [batch, seq_len] int64, offset of the first character; -1 outside the context
    ends: Tensor | None = None  # [batch, seq_len] int64, offset after the last character; -1 outside the context
    nulls: tuple[int, ...] = ()  # null position of each chunk
    origins: tuple[int, ...] = ()  # index of the row in the split that each chunk belongs to


class QuestionAnswering(Task):
    """The task `question_answering`: each chunk of a row is a sample, and metrics combine the chunks of a row.

    A chunk consists of the whole question and as much of the context as fits. If it does not contain the answer, its
    target is the null position: the CLS token of the tokenizer, or the first token if there is no CLS token.

    Args:
        config: Task configuration.
        facts: Properties of the tokenizer: padding and token types.
        padding_free: Ignored; this task always pads.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: QuestionAnsweringConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts

    @staticmethod
    def architecture(config: QuestionAnsweringConfig, facts: Facts) -> Architecture:
        """Return the architecture: a newly initialized head with two outputs per token, the start and the end logit.

        `num_labels` overrides that of the base model, which may have been trained with other labels.
        """
        return Architecture("AutoModelForQuestionAnswering", {"num_labels": 2}, new_head=True)

    @property
    def layout(self) -> Layout:
        """One sequence per chunk, with the character offsets of its tokens."""
        from .batches.padded import input_columns

        return Layout(
            {"max_length": self.config.max_length},
            (*input_columns(self.facts), BEGINS, ENDS),
            (SPAN, NULL, ORIGIN),
            kept=("id", "context", "question", "answers"),
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a row into chunks of at most `max_length` tokens.

        Raises:
            RequestError: If the tokenizer does not provide character offsets.
            RowFault: If the question or the context is empty, the answer is missing or does not occur in the context,
                or the question is too long.
        """
        fast = tokenizer.tokenizer
        if not fast.is_fast:
            rule = "a slow tokenizer is not supported with task=question_answering: it provides no character offsets"
            raise RequestError.of("model.tokenizer", rule, "set it to a folder with tokenizer.json")
        question, context = row["question"].strip(), row["context"]
        for name, text in (("question", question), ("context", context.strip())):
            if not text:
                raise RowFault(f"the {name} is empty", "remove such rows")
        answer = self._find_answer(row)
        encoded = fast(question, context, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        return self._cut(encoded, context, answer, fast.cls_token_id)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Return the same chunks as `encode`, which are never too long."""
        return self.encode(row, tokenizer)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return 1 for each sample, `[samples]` int64: each chunk is one term of the loss."""
        return np.ones(len(samples), dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate chunks into padded rows; targets are the first and the last token of the answer, `[batch, 2]`."""
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
        """Compute the sum over chunks of the mean of the start and the end cross-entropy, and the number of chunks."""
        return _loss(_logits(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss and the best spans of each chunk."""
        from dataclasses import replace

        assert isinstance(batch, PieceBatch) and batch.begins is not None and batch.ends is not None
        logits = _logits(model, batch)
        starts, ends = logits.detach().cpu().unbind(dim=1)
        kept = slice(len(batch.samples))  # empty for a batch without targets
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
        """Compute `loss`, `exact_match` and `f1`; see `scores/answers.py`."""
        from .scores.answers import measure

        return {"loss": float(totals.loss) / float(totals.weight)} | measure(self.by_row(totals, rows))

    def by_row(self, totals: LossSum, rows: Sequence[Row]) -> Sequence[Prediction]:
        """Combine the predictions of the chunks of each row into one answer per row."""
        return answer_rows(totals.predictions, rows, self.config.n_best, self.config.null_score_diff_threshold)

    def _find_answer(self, row: Row) -> Span | None:
        """Return the character offsets of the answer, or None if the question is unanswerable."""
        if not row["answers"]["text"]:
            if self.config.null_score_diff_threshold is None:
                way_out = "set task.null_score_diff_threshold=0.0 to allow unanswerable questions"
                raise RowFault("the row has no answer", way_out)
            return None
        if (answer := find_answer(row["context"], row["answers"])) is None:
            raise RowFault("the answer does not occur in the context", "correct the text of the answer")
        return answer

    def _cut(self, encoded: Any, context: str, answer: Span | None, cls_id: int | None) -> list[Example]:
        """Split a row into chunks; `encoded` is its tokenized pair of question and context."""
        from .batches.padded import input_columns

        ids, sides = encoded["input_ids"], encoded.sequence_ids(0)
        inside = [place for place, side in enumerate(sides) if side == 1]
        first, count = (inside[0], len(inside)) if inside else (0, 0)
        stop = first + count
        offsets = [_trim(context, *pair) for pair in encoded["offset_mapping"][first:stop]]
        if all(begin < 0 for begin, _ in offsets):
            raise RowFault("the context has no tokens", "remove such rows")
        begins, ends = np.array(offsets).T
        found = None if answer is None else find_tokens(begins, ends, answer)
        if answer is not None and found is None:
            raise RowFault("the answer has no tokens", "remove such rows")
        room = self.config.max_length - (len(ids) - count)
        if room < count and room <= self.config.doc_stride:
            rule = "the question is too long: at most task.doc_stride tokens of the context fit into task.max_length"
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
    """Strip whitespace from the character offsets of a token; the result is (-1, -1) if nothing is left.

    Byte-level tokenizers count the whitespace before a word to its token, but an answer must not start or end with it.
    """
    text = context[begin:end]
    bare = text.strip()
    at = begin + len(text) - len(text.lstrip())
    return (at, at + len(bare)) if bare else (-1, -1)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the start and end logits, `[n, 2, seq_len]` float32.

    They are -inf at padding, so that the loss of a chunk does not depend on the length of others in the micro-batch.
    """
    import torch

    output = model(**batch.inputs)
    mask = batch.inputs["attention_mask"]
    both = torch.stack([output.start_logits, output.end_logits], dim=1)
    both = both[..., -mask.shape[1] :].float()  # the method may have prepended virtual tokens
    return both.masked_fill(mask[:, None] == 0, float("-inf"))[batch.positions]


def _loss(logits: Tensor, batch: Batch) -> LossSum:
    from torch.nn import functional

    both = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    losses = both.view(-1, 2).sum(dim=1) / 2
    return LossSum(losses.sum(), losses.new_full((), batch.loss_weight), losses=losses)
