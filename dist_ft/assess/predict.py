"""Predictions for a single prompt in tasks without free text generation: labels, tags, spans, masked words, rewards.

A prompt is converted to a row of the task with a placeholder label and processed like a row of an evaluation, so that
the prediction equals what `dist-ft eval` writes. Masked language modeling differs: the user places the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config.run import RunConfig
from ..config.task import Seq2SeqConfig
from ..data.read.pairs import pair_of
from ..data.render.template import ChatTokenizer
from ..data.render.turns import Supervision
from ..errors import RequestError
from ..families import architecture_of, build_task
from ..prepare import Prepared
from ..process.place import Place, find_device
from ..state import Prediction, Row
from .predictor import Given, Predictor
from .scoring import open_model

MOST = 5  # maximum number of labels or words shown
NONE = "(none)"


class LabelPredictor(Predictor):
    """Predicts the label or labels of a text, and the probabilities of the most likely labels."""

    columns = ("text",)
    optional = ("text_pair",)

    def row(self, given: Given) -> Row:
        return {**given, "label": self.facts.labels[0]}

    def text(self, row: Row) -> str:
        return " | ".join(row[name] for name in ("text", "text_pair") if name in row)

    def say(self, prediction: Prediction, row: Row) -> str:
        pairs = zip(self.facts.labels, prediction["probabilities"], strict=True)
        likeliest = sorted(pairs, key=lambda pair: -pair[1])[:MOST]
        return f"{_join(prediction['prediction'])}  ({_percent(likeliest)})"

    def known(self, prediction: Prediction, row: Row) -> str | None:
        return _join(prediction["label"])


class TagPredictor(Predictor):
    """Predicts the entities among whitespace-separated words, or the tag of each word if the tags are not entities."""

    columns = ("tokens",)

    def row(self, given: Given) -> Row:
        words = given["tokens"].split() if isinstance(given["tokens"], str) else given["tokens"]
        return {"tokens": words, "tags": [self.facts.labels[0]] * len(words)}

    def text(self, row: Row) -> str:
        return " ".join(row["tokens"])

    def say(self, prediction: Prediction, row: Row) -> str:
        return self._show(prediction["prediction"], row["tokens"])

    def known(self, prediction: Prediction, row: Row) -> str | None:
        return self._show(prediction["tags"], row["tokens"])

    def _show(self, tags: Sequence[str], words: Sequence[str]) -> str:
        from ..task.scores.entities import has_entities

        if not has_entities(self.facts.labels):
            return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
        from seqeval.metrics.sequence_labeling import get_entities

        found = (f"{kind}: {' '.join(words[first : last + 1])}" for kind, first, last in get_entities(list(tags)))
        return "; ".join(found) or NONE


class SpanPredictor(Predictor):
    """Predicts the span of a context that answers a question, and its probability."""

    columns = ("question", "context")

    def row(self, given: Given) -> Row:
        return {**given, "answers": {"text": [given["context"]], "answer_start": [0]}}

    def text(self, row: Row) -> str:
        return str(row["question"])

    def say(self, prediction: Prediction, row: Row) -> str:
        return f"{prediction['prediction'] or NONE}  ({prediction['score']:.1%})"

    def known(self, prediction: Prediction, row: Row) -> str | None:
        return next(iter(prediction["answers"]), NONE)


class TextPredictor(Predictor):
    """Generates the target text of a source text with an encoder-decoder model, as in evaluations."""

    columns = ("source",)

    def row(self, given: Given) -> Row:
        return {"source": given["source"], "target": "."}

    def text(self, row: Row) -> str:
        return str(row["source"] if "source" in row else row["prompt"])

    def say(self, prediction: Prediction, row: Row) -> str:
        return str(prediction["prediction"])

    def known(self, prediction: Prediction, row: Row) -> str | None:
        return str(prediction["label"])


class RewardPredictor(Predictor):
    """Predicts the reward of an answer to a prompt."""

    columns = ("prompt", "answer")

    def row(self, given: Given) -> Row:
        prompt = given["prompt"]
        if self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        other = "." if given["answer"] != "." else "?"  # the task scores pairs of different answers
        return pair_of({"prompt": prompt, "chosen": given["answer"], "rejected": other})

    def text(self, row: Row) -> str:
        return " | ".join(_text_of(row[name]) for name in ("prompt", "chosen"))

    def say(self, prediction: Prediction, row: Row) -> str:
        return f"{prediction['reward_chosen']:.4f}"

    def known(self, prediction: Prediction, row: Row) -> str | None:
        return f"should be higher than the reward of: {_text_of(row['rejected'])}"


class MaskPredictor(Predictor):
    """Predicts the most likely words for each mask in a text, and their probabilities."""

    columns = ("text",)

    def row(self, given: Given) -> Row:
        return given

    def text(self, row: Row) -> str:
        return str(row["text"])

    def say(self, prediction: Prediction, row: Row) -> str:
        return "\n".join(_percent(words) for words in prediction["masks"])

    @torch.no_grad()
    def predict(self, row: Row) -> Prediction:
        """Return the most likely words for each mask.

        Raises:
            RequestError: If there is no mask within the maximum length of the task.
        """
        tokenizer: Any = self.tokenizer.tokenizer
        most: int = self.task.config.max_length  # type: ignore[attr-defined]
        device = next(self.model.parameters()).device
        ids = tokenizer(row["text"], truncation=True, max_length=most, return_tensors="pt")["input_ids"].to(device)
        places = (ids[0] == self.facts.mask_id).nonzero().flatten()
        if not len(places):
            rule = f"there is no {tokenizer.mask_token} in its first {most} tokens, so there is nothing to predict"
            raise RequestError.of("prompt", rule, f"write {tokenizer.mask_token} in place of a word")
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        best = logits[places].float().softmax(dim=-1).topk(min(MOST, logits.shape[-1]))
        return {
            "masks": [
                [(tokenizer.decode([number]).strip(), value) for number, value in zip(*both, strict=True)]
                for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        }


PREDICTORS: dict[str, type[Predictor]] = {
    "sequence_classification": LabelPredictor,
    "token_classification": TagPredictor,
    "question_answering": SpanPredictor,
    "seq2seq": TextPredictor,
    "reward": RewardPredictor,
    "masked_lm": MaskPredictor,
}


def open_predictors(
    names: Mapping[str, str],
    config: RunConfig,
    prepared: Prepared,
    run_dir: Path,
    tokenizer: Any,
    *,
    chat: bool,
    max_new_tokens: int | None = None,
) -> list[Predictor]:
    """Open models of a run as predictors that predict as its evaluations do.

    Args:
        names: displayed name → `base` or `export`.
        config: configuration of the run.
        prepared: prepared data of the run.
        run_dir: folder of the run.
        tokenizer: tokenizer of the export or the run.
        chat: whether prompts are user messages of a conversation.
        max_new_tokens: maximum number of generated tokens with `seq2seq`; defaults to that of evaluations.

    Raises:
        RequestError: If the base model is requested but its head would be randomly initialized.
    """
    task = config.task
    if "base" in names.values() and architecture_of(config, prepared.facts).new_head:
        rule = f"the base model has no head for task={task.name}, and a randomly initialized one predicts at random"
        raise RequestError.of("model", rule, "set model=export")
    if isinstance(task, Seq2SeqConfig):  # evaluations generate text only if a metric needs it
        most = max_new_tokens or task.max_new_tokens
        task = task.model_copy(update={"metrics": task.metrics or ["exact_match"], "max_new_tokens": most})
        config = config.model_copy(update={"task": task})
    predictors, device = [], find_device(Place())
    for name, which in names.items():
        model, attention = open_model(which, config, prepared, run_dir, device)
        built = build_task(config, prepared.facts, attention)
        kind = PREDICTORS[task.name]
        encoder = ChatTokenizer(tokenizer, Supervision.of(config.task))
        predictors.append(kind(name, model, built, prepared.facts, encoder, chat=chat))
    return predictors


def _percent(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in pairs)


def _join(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names) or NONE


def _text_of(value: str | Sequence[Mapping[str, Any]]) -> str:
    return value if isinstance(value, str) else " ".join(str(message.get("content", "")) for message in value)
