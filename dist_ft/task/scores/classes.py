"""Scores of predicted classes by scikit-learn, from every row's prediction: the same on any world and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics

from ...state import Prediction

BINS = 15  # of calibration, as in Guo et al. 2017


def measure(predictions: Sequence[Prediction], labels: Sequence[str], *, multi_label: bool) -> dict[str, float]:
    """Accuracy (multi-label: rows with exactly the right labels), F1, Matthews correlation, calibration error.

    F1 is the mean over classes that the split has; of two classes also that of the second one (`f1_binary`).

    Args:
        predictions: of every row: `label`, `prediction`, `probabilities`.
        labels: names in the order of their numbers.
        multi_label: whether rows have lists of labels.
    """
    if multi_label:
        wanted, taken = (_indicators(predictions, key, labels) for key in ("label", "prediction"))
        return {
            "accuracy": float((wanted == taken).all(axis=1).mean()),
            "f1": float(metrics.f1_score(wanted, taken, average="macro", zero_division=0)),
            "f1_micro": float(metrics.f1_score(wanted, taken, average="micro", zero_division=0)),
        }
    given, chosen = ([row[key] for row in predictions] for key in ("label", "prediction"))
    found = {
        "accuracy": float(metrics.accuracy_score(given, chosen)),
        "f1": float(metrics.f1_score(given, chosen, average="macro", zero_division=0)),
        "matthews_correlation": float(metrics.matthews_corrcoef(given, chosen)),
        "calibration_error": calibration_error(predictions),
    }
    if len(labels) == 2:
        found["f1_binary"] = float(metrics.f1_score(given, chosen, pos_label=labels[1], zero_division=0))
    return found


def describe(predictions: Sequence[Prediction], labels: Sequence[str], *, multi_label: bool) -> dict[str, Any]:
    """`per_class`: precision, recall, f1 and support by name; `confusion`: rows given, columns predicted."""
    given: Any
    chosen: Any
    names: Sequence[int | str]
    if multi_label:
        given, chosen = (_indicators(predictions, key, labels) for key in ("label", "prediction"))
        names = range(len(labels))
    else:
        given, chosen = ([row[key] for row in predictions] for key in ("label", "prediction"))
        names = labels
    names = list(names)
    table = np.stack(metrics.precision_recall_fscore_support(given, chosen, labels=names, zero_division=0), axis=1)
    columns = ("precision", "recall", "f1", "support")
    found: dict[str, Any] = {
        "per_class": {
            name: dict(zip(columns, map(float, row), strict=True)) for name, row in zip(labels, table, strict=True)
        }
    }
    if not multi_label:
        found["labels"] = list(labels)
        found["confusion"] = metrics.confusion_matrix(given, chosen, labels=names).tolist()
    return found


def calibration_error(predictions: Sequence[Prediction]) -> float:
    """Expected calibration error: |accuracy - confidence| over bins of equal width (Guo et al. 2017, section 2)."""
    confidence = np.array([max(row["probabilities"]) for row in predictions])
    right = np.array([row["label"] == row["prediction"] for row in predictions], dtype=float)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(confidence))


def _indicators(predictions: Sequence[Prediction], key: str, labels: Sequence[str]) -> np.ndarray:
    """[rows, labels] of 0 and 1."""
    return np.array([[int(name in row[key]) for name in labels] for row in predictions])
