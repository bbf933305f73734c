"""Row subsets: without repeats, k-shot per label, folds and held-out shares, as functions of the data and a seed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ...config.data import held_out
from ...config.run import RunConfig
from ...errors import RequestError
from .faults import RowFault
from .formats import is_unlabelled, normalise_for
from .rows import Placed, Unparsed, parse_row, read_unparsed
from .sets import SplitName

_DRAW, _HOLD = 2, 3  # words of the Philox counter that separate these streams and those of order.py and masks.py


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
    return ((place, parse_row(row)) for _, place, row in read_numbered(alone, split, chosen))


def read_numbered(
    alone: RunConfig, split: SplitName, chosen: Chosen | None = None
) -> Iterator[tuple[int, str, Unparsed]]:
    """Return an iterator over `(index, place, unparsed row)`, where `index` counts all rows of the source.

    See `read_split` for the arguments and errors.
    """
    rows = _unparsed_rows(alone, split)
    chosen = chosen or choose(alone, split)
    if chosen is None:
        return ((number, place, row) for number, (place, row) in enumerate(rows))
    wanted = np.zeros(chosen.of, dtype=bool)
    wanted[chosen.rows] = True
    pairs = zip(rows, wanted.tolist(), strict=True)
    return ((number, place, row) for number, ((place, row), is_wanted) in enumerate(pairs) if is_wanted)


def source_rows(alone: RunConfig, split: SplitName) -> Placed:
    """Return an iterator over `(place, row)` of all rows from which those of a split are selected.

    Raises:
        RequestError: Rows cannot be read.
    """
    return ((place, parse_row(row)) for place, row in _unparsed_rows(alone, split))


def _unparsed_rows(alone: RunConfig, split: SplitName) -> Iterator[tuple[str, Unparsed]]:
    data = alone.data
    rows = read_unparsed(
        data.sources(split) or [],
        revision=data.revision,
        split=data.source_split(split),
        delimiter=data.delimiter,
        sample_by=data.sample_by,
    )
    return islice(rows, data.max_rows)


def source_identity(alone: RunConfig) -> dict[str, Any]:
    """Return the keys besides the sources that determine which rows are read and what is in them."""
    data = alone.data
    keys = ("format", "columns", "template", "delimiter", "max_rows", "invalid_rows")
    found = {key: value for key in keys if (value := getattr(data, key)) not in (None, {})}
    return found if data.sample_by == "paragraph" else {**found, "sample_by": data.sample_by}


def choose(alone: RunConfig, split: SplitName) -> Chosen | None:
    """Select the rows of a split if keys of `data` limit them, else return None.

    Repeated rows are left out first (`duplicates`). Folds are those of scikit-learn's `StratifiedKFold` (`KFold` if no
    row has a label), with shuffling; a share of the rows (`validation=10%`) is drawn from all of them alike. The k rows
    of each label (`k_shot`) are drawn from the remaining training rows.

    Raises:
        RequestError: There are too few rows in total or of a label.
    """
    data, seed = alone.data, subset_seed(alone)
    if identity(alone, split) is None:
        return None
    labels, is_first = _look_through(alone, split)
    rows, told = np.arange(len(labels)), []
    if data.duplicates == "drop":
        rows = np.flatnonzero(is_first)
        told.append(f"without {len(labels) - len(rows)} repeated")
    if data.folds is not None and split in ("train", "validation"):
        picked = _fold([labels[row] for row in rows], data.folds, data.fold or 0, seed, held_out=split == "validation")
        rows = rows[picked]
        side = "fold" if split == "validation" else "all but fold"
        told.append(f"{side} {data.fold or 0} of {data.folds}")
    elif (share := held_out(data.validation)) is not None and split in ("train", "validation"):
        rows = _share(rows, share, seed, held_out=split == "validation")
        told.append(f"{data.validation} held out" if split == "train" else f"{data.validation} of the training rows")
    if data.k_shot is not None and split == "train":
        rows = _draw(labels, rows, data.k_shot, seed)
        told.append(f"{data.k_shot} per label")
    if len(told) > (data.duplicates == "drop"):
        told[-1] += f"; seed {seed}"
    return Chosen(np.sort(rows), len(labels), ", ".join(told))


def identity(alone: RunConfig, split: SplitName) -> Mapping[str, Any] | None:
    """Return everything besides the rows that determines the selection, or None if all rows are selected."""
    data = alone.data
    drawn: dict[str, Any] = {}
    if data.k_shot is not None and split == "train":
        drawn["k_shot"] = data.k_shot
    if data.folds is not None and split in ("train", "validation"):
        drawn |= {"folds": data.folds, "fold": data.fold or 0}
    if (share := held_out(data.validation)) is not None and split in ("train", "validation"):
        drawn["held_out"] = share
    if drawn:
        drawn |= {"seed": subset_seed(alone), "split": split}
    if data.duplicates == "drop":
        drawn["duplicates"] = "drop"
    return drawn or None


def subset_seed(config: RunConfig) -> int:
    """Return `data.subset_seed`, or `train.seed` if it is not set."""
    return config.train.seed if config.data.subset_seed is None else config.data.subset_seed


def has_labels(config: RunConfig) -> bool:
    """Return whether the task assigns exactly one label to each row."""
    return config.task.name == "sequence_classification" and not config.task.multi_label


def _look_through(alone: RunConfig, split: SplitName) -> tuple[list[str | None], list[bool]]:
    """Return for each row of the source its label, if the row and the task have one, and whether it is no repeat."""
    labels: list[str | None] = []
    is_first: list[bool] = []
    seen: set[bytes] = set()
    with_labels, drops = has_labels(alone), alone.data.duplicates == "drop"
    for _, row in source_rows(alone, split):
        label, is_new = None, True
        if with_labels or drops:
            with contextlib.suppress(RowFault):  # reported when the row is tokenized
                canonical = normalise_for(alone, row)[1]
                label = _label(canonical["label"], alone) if with_labels else None
                if drops:
                    digest = hashlib.blake2b(json.dumps(canonical, sort_keys=True).encode(), digest_size=16).digest()
                    is_new = digest not in seen
                    seen.add(digest)
        labels.append(label)
        is_first.append(is_new)
    return labels, is_first


def _label(label: Any, config: RunConfig) -> str | None:
    label = label[0] if isinstance(label, list) and len(label) == 1 else label
    return None if isinstance(label, list) or is_unlabelled(label, config.task.labels) else str(label)  # type: ignore[union-attr]


def _share(rows: np.ndarray, share: float, seed: int, *, held_out: bool) -> np.ndarray:
    """Draw round(share · rows) of the rows, at least one, or return the others."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        rule = f"{share:.2%} of {len(rows)} rows are {count}, which leaves none to train on"
        raise RequestError.of("data.validation", rule, "set a smaller share, or use more rows")
    order = np.argsort(_generator(seed, 0, _HOLD).random_raw(len(rows)), kind="stable")
    return rows[order[:count] if held_out else order[count:]]


def _generator(seed: int, number: int, purpose: int) -> np.random.Philox:
    key = np.array([seed % 2**64, number], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, purpose, 0], dtype=np.uint64))


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
        order = np.argsort(_generator(seed, number, _DRAW).random_raw(len(found)), kind="stable")[:count]
        drawn += [found[place] for place in order.tolist()]
    return np.asarray(drawn, dtype=np.int64)
