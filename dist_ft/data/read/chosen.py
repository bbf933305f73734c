"""Row subsets: k-shot sampling per label and cross-validation folds, as pure functions of the data and a seed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config.run import RunConfig
from ...errors import RequestError
from .faults import RowFault
from .formats import normalise_for
from .rows import Placed, read_rows
from .sets import SplitName

_DRAW = 2  # word of the Philox counter that makes this stream independent of those in order.py and masks.py


@dataclass(frozen=True)
class Chosen:
    """Rows of a source that are selected for a split."""

    rows: np.ndarray  # [num_selected] int64, row indices in ascending order
    of: int  # number of rows in the source
    told: str  # description of the selection for the user


def read_split(alone: RunConfig, split: SplitName, chosen: Chosen | None = None) -> Placed:
    """Return an iterator over `(place, row)` of the selected rows of one dataset's split.

    Args:
        alone: Configuration of the single dataset (see sets.py).
        split: Name of the split.
        chosen: Result of `choose`. If None, `choose` is called, which reads all rows of the source.

    Raises:
        RequestError: Rows cannot be read, or there are too few for the requested subset.
    """
    return ((place, row) for _, place, row in read_numbered(alone, split, chosen))


def read_numbered(
    alone: RunConfig, split: SplitName, chosen: Chosen | None = None
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Return an iterator over `(index, place, row)`, where `index` counts all rows of the source.

    See `read_split` for the arguments and errors.
    """
    rows = read_rows(alone.data.sources(split) or [], revision=alone.data.revision)
    chosen = chosen or choose(alone, split)
    if chosen is None:
        return ((number, place, row) for number, (place, row) in enumerate(rows))
    wanted = np.zeros(chosen.of, dtype=bool)
    wanted[chosen.rows] = True
    pairs = zip(rows, wanted.tolist(), strict=True)
    return ((number, place, row) for number, ((place, row), is_wanted) in enumerate(pairs) if is_wanted)


def choose(alone: RunConfig, split: SplitName) -> Chosen | None:
    """Select the rows of a split if `data.k_shot` or `data.folds` limits them, else return None.

    Folds are those of scikit-learn's `StratifiedKFold` (`KFold` if no row has a label), with shuffling. The k rows of
    each label are drawn from the training rows of the fold.

    Raises:
        RequestError: There are too few rows in total or of a label.
    """
    data, seed = alone.data, subset_seed(alone)
    if identity(alone, split) is None:
        return None
    labels = list(_labels(alone))
    rows, told = np.arange(len(labels)), []
    if data.folds is not None:
        rows = _fold(labels, data.folds, data.fold or 0, seed, held_out=split == "validation")
        side = "fold" if split == "validation" else "all but fold"
        told.append(f"{side} {data.fold or 0} of {data.folds}")
    if data.k_shot is not None and split == "train":
        rows = _draw(labels, rows, data.k_shot, seed)
        told.append(f"{data.k_shot} per label")
    return Chosen(np.sort(rows), len(labels), f"{', '.join(told)}; seed {seed}")


def identity(alone: RunConfig, split: SplitName) -> Mapping[str, Any] | None:
    """Return everything besides the rows that determines the selection, or None if all rows are selected."""
    data = alone.data
    k_shot = data.k_shot if split == "train" else None
    folds = data.folds if split in ("train", "validation") else None
    if k_shot is None and folds is None:
        return None
    return {"k_shot": k_shot, "folds": folds, "fold": data.fold or 0, "seed": subset_seed(alone), "split": split}


def subset_seed(config: RunConfig) -> int:
    """Return `data.subset_seed`, or `train.seed` if it is not set."""
    return config.train.seed if config.data.subset_seed is None else config.data.subset_seed


def has_labels(config: RunConfig) -> bool:
    """Return whether the task assigns exactly one label to each row."""
    return config.task.name == "sequence_classification" and not config.task.multi_label


def _labels(alone: RunConfig) -> Iterator[str | None]:
    """Yield the label of each training row, or None if the row or the task has none."""
    for place, row in read_rows(alone.data.train or [], revision=alone.data.revision):
        if not has_labels(alone):
            yield None
            continue
        try:
            label = normalise_for(alone, row, place)[1]["label"]
        except RowFault:  # reported when the row is tokenized
            label = None
        label = label[0] if isinstance(label, list) and len(label) == 1 else label
        yield None if label in (None, "", -1) or isinstance(label, list) else str(label)


def _fold(labels: list[str | None], folds: int, fold: int, seed: int, *, held_out: bool) -> np.ndarray:
    from sklearn.model_selection import KFold, StratifiedKFold

    stratified = any(label is not None for label in labels)
    kind = StratifiedKFold if stratified else KFold
    names = [label or "" for label in labels]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # labels with fewer rows than folds are allowed
            parts = list(kind(folds, shuffle=True, random_state=seed % 2**32).split(np.zeros(len(labels)), names))
    except ValueError as error:
        rule = f"{len(labels)} rows cannot be split into {folds} folds ({error})"
        raise RequestError.of("data.folds", rule, "set a smaller data.folds") from error
    train, held = parts[fold]
    return np.asarray(held if held_out else train, dtype=np.int64)


def _draw(labels: list[str | None], rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` of the `rows` for each label without replacement."""
    places: dict[str, list[int]] = {label: [] for label in sorted({label for label in labels if label is not None})}
    for row in rows.tolist():
        if (label := labels[row]) is not None:
            places[label].append(row)
    short = {label: len(found) for label, found in places.items() if len(found) < count}
    if short:
        listed = ", ".join(f"{label} has {number}" for label, number in list(short.items())[:8])
        rule = f"some labels have fewer than {count} training rows: {listed}{', …' if len(short) > 8 else ''}"
        raise RequestError.of(
            "data.k_shot", rule, f"set k_shot to at most {min(short.values())}, or remove these labels"
        )
    drawn: list[int] = []
    for number, found in enumerate(places.values()):
        generator = np.random.Philox(
            key=np.array([seed % 2**64, number], dtype=np.uint64), counter=np.array([0, 0, _DRAW, 0], dtype=np.uint64)
        )
        order = np.argsort(generator.random_raw(len(found)), kind="stable")[:count]
        drawn += [found[place] for place in order.tolist()]
    return np.asarray(drawn, dtype=np.int64)
