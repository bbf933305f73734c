"""Classification metrics by scikit-learn, computed over all rows and thus independent of world size and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics

from ...state import Prediction

BINS = 15  # number of calibration bins, as in Guo et al. 2017


def measure(predictions: Sequence[Prediction], labels: Sequence[str], *, multi_label: bool) -> dict[str, float]:
    """Compute accuracy, macro F1, and the Matthews correlation and calibration error or, for multi-label, micro F1.

    For multi-label, the accuracy is the fraction of rows with exactly the right labels; otherwise, macro F1 is the mean
    over the classes that occur as a label or as a prediction. With two classes, `f1_binary` is the F1 of the second.

    Args:
        predictions: Predictions of all rows, with `label`, `prediction` and `probabilities`.
        labels: Names of the labels in the order of their indices.
        multi_label: Whether `label` and `prediction` are lists of labels.
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
    """Compute the metrics of each class and, for single-label, the confusion matrix.

    Args:
        predictions: Predictions of all rows, with `label` and `prediction`.
        labels: Names of the labels in the order of their indices.
        multi_label: Whether `label` and `prediction` are lists of labels.

    Returns:
        `per_class` with precision, recall, f1 and support by name of the class and, for single-label, `confusion` with
        true labels as rows and predicted labels as columns, and their order in `labels`.
    """
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
    """Compute the expected calibration error (Guo et al. 2017, section 2).

    It is the mean of |accuracy - confidence| over bins of equal width, weighted by the number of rows in each bin.
    """
    confidence = np.array([max(row["probabilities"]) for row in predictions])
    right = np.array([row["label"] == row["prediction"] for row in predictions], dtype=float)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(confidence))


def _indicators(predictions: Sequence[Prediction], key: str, labels: Sequence[str]) -> np.ndarray:
    """Return the lists of labels as multi-hot vectors, `[rows, labels]`."""
    return np.array([[int(name in row[key]) for name in labels] for row in predictions])
