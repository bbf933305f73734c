"""Token classification metrics: of entities by seqeval if the tags are of an IOB scheme, else of tags by scikit-learn.

The default mode of seqeval counts entities like the script of CoNLL-2000, for IOB1, IOB2 and IOBES: an `I-` tag without
a preceding `B-` tag starts an entity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sklearn import metrics

from ...state import Prediction

_IOB = re.compile(r"O|[BIES]-.+", re.DOTALL)


def has_entities(labels: Sequence[str]) -> bool:
    """Return whether the tags are of an IOB scheme."""
    return all(_IOB.fullmatch(label) for label in labels) and any(label != "O" for label in labels)


def measure(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
    """Compute the accuracy of words, and micro-averaged precision, recall and F1 of entities or macro F1 of tags.

    Args:
        predictions: Predictions of all rows, with `tags` and `prediction`, each one tag name per word.
        labels: Names of the tags in the order of their indices.
    """
    given, chosen = _flat(predictions, "tags"), _flat(predictions, "prediction")
    found = {"accuracy": float(metrics.accuracy_score(given, chosen))}
    if not has_entities(labels):
        return found | {"f1": float(metrics.f1_score(given, chosen, average="macro", zero_division=0))}
    from seqeval import metrics as entities

    gold, guessed = _sequences(predictions)
    for name in ("precision", "recall", "f1"):
        score = getattr(entities, f"{name}_score")
        found[name] = float(score(gold, guessed, average="micro", zero_division=0))
    return found


def describe(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """Compute `per_class`: precision, recall, f1 and support of each entity type, or of each tag."""
    if has_entities(labels):
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

        names: Sequence[str] = sorted({label[2:] for label in labels if label != "O"})
        gold, guessed = _sequences(predictions)
        present = [name for name in names if any(tag[2:] == name for row in (*gold, *guessed) for tag in row)]
        columns = precision_recall_fscore_support(gold, guessed, average=None, zero_division=0) if present else ()
        scores = dict(zip(present, zip(*columns, strict=True), strict=True))
        rows = [scores.get(name, (0.0, 0.0, 0.0, 0)) for name in names]
    else:
        names = list(labels)
        given, chosen = _flat(predictions, "tags"), _flat(predictions, "prediction")
        columns = metrics.precision_recall_fscore_support(given, chosen, labels=names, zero_division=0)
        rows = list(zip(*columns, strict=True))
    keys = ("precision", "recall", "f1", "support")
    return {
        "per_class": {
            name: dict(zip(keys, map(float, row), strict=True)) for name, row in zip(names, rows, strict=True)
        }
    }


def _flat(predictions: Sequence[Prediction], key: str) -> list[str]:
    return [tag for row in predictions for tag in row[key]]


def _sequences(predictions: Sequence[Prediction]) -> tuple[list[list[str]], list[list[str]]]:
    return [row["tags"] for row in predictions], [row["prediction"] for row in predictions]
