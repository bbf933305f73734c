"""Label names and label ids, determined from the training split and shared by all splits and the exported model."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...config.run import RunConfig
from ...errors import RequestError
from ...state import Facts
from ..read.chosen import Chosen, choose, source_rows
from ..read.faults import RowFault
from ..read.formats import NO_LABEL, is_unlabelled, normalise_for
from ..read.sets import name_in_mixture, sets_of

Labels = Callable[[Mapping[str, Any]], Iterable[tuple[int | str, str | None]]]  # row -> (label, name of the label)
OUTSIDE = "O"  # tag of the IOB schemes, which always gets label id 0


def find_labels(config: RunConfig, labels_of: Labels) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Determine the label names and count the labels of the training rows (of a mixture, those of all its datasets).

    The names are those of `task.labels` if set. Otherwise they are found in the data: integer labels in ascending order
    (named by `label_text` if each label has exactly one name), string labels in alphabetical order.

    Args:
        config: Configuration of the run.
        labels_of: Function that returns the labels of a canonical row.

    Returns:
        The label names ordered by label id, the count of each label, and the number of training rows.

    Raises:
        RequestError: There are fewer than two labels, or the data mixes integer and string labels.
    """
    seen: set[int | str] = set()  # labels of all rows, so that label ids are the same in every fold and subset
    counts: Counter[int | str] = Counter()
    names: dict[int | str, set[str]] = {}
    rows = 0
    for name, alone in sets_of(config).items():
        chosen = _choose(name, alone)
        taken = None if chosen is None else set(chosen.rows.tolist())
        for at, (_, row) in enumerate(source_rows(alone, "train")):
            is_taken = taken is None or at in taken
            rows += is_taken
            with contextlib.suppress(RowFault):  # counted when the row is tokenized
                for value, text in labels_of(normalise_for(alone, row)[1]):
                    if is_unlabelled(value, config.task.labels):  # type: ignore[union-attr]
                        continue
                    seen.add(value)
                    counts[value] += is_taken
                    if text is not None:
                        names.setdefault(value, set()).add(text)
    given: Sequence[str] | None = config.task.labels  # type: ignore[union-attr]
    where = "data.train" if config.data.mixture is None else "data.mixture"
    found = tuple(given) if given is not None else _ordered(seen, names, where)
    if len(found) < 2:
        rule = (
            f"{len(found)} label{'s' * (len(found) != 1)} found ({', '.join(found) or 'none'}), at least 2 are required"
        )
        raise RequestError.of(where, rule, "set data.columns so that label is the column with the labels")
    tallies = [0] * len(found)
    for value, count in counts.items():
        number = find_number(value, found)
        if number is not None:
            tallies[number] += count
    return found, tuple(tallies), rows


def _choose(name: str, alone: RunConfig) -> Chosen | None:
    """Return the selected rows of a dataset, and name this dataset in errors even while another one is prepared."""
    try:
        return choose(alone, "train")
    except RequestError as error:
        raise RequestError(*(replace(p, where=name_in_mixture(p.where, name)) for p in error.problems)) from error


def head_settings(facts: Facts) -> dict[str, Any]:
    """Return the config.json settings of a classification head with one output per label."""
    names = dict(enumerate(facts.labels))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "pad_token_id": facts.pad_id,
    }


def find_number(value: int | str, labels: Sequence[str]) -> int | None:
    """Return the id of a label given by name or id, or None if the label is unknown.

    An integer is an id only if no name is an integer: of the labels 1, 2 and 3, 0 is none and 1 is not the second.
    """
    if str(value) in labels:
        return labels.index(str(value))
    is_id = isinstance(value, int) and 0 <= value < len(labels) and not any(_is_integer(name) for name in labels)
    return int(value) if is_id else None


def _is_integer(name: str) -> bool:
    return name.strip().removeprefix("-").isdecimal()


def describe_alike(labels: Sequence[str]) -> str | None:
    """Return a warning about labels that differ only in case, white space, punctuation or notation, or None."""
    alike: dict[str, list[str]] = {}
    for name in labels:
        alike.setdefault(_folded(name), []).append(name)
    if groups := [names for names in alike.values() if len(names) > 1]:
        shown = "; ".join(" and ".join(map(repr, names)) for names in groups[:8])
        return f"labels that are almost the same are separate classes: {shown}"
    return None


def _folded(name: str) -> str:
    folded = " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold().strip(" \t\r\n.")))
    with contextlib.suppress(ValueError):
        return repr(float(folded))
    return folded


def number_of(value: Any, labels: Sequence[str]) -> int:
    """Return the id of a row's label.

    Raises:
        RowFault: The label is missing or not one of `labels`.
    """
    if value == NO_LABEL and is_unlabelled(value, labels):
        way_out = "set task.labels with '-1' among the names if it is a class, or give every row a label"
        raise RowFault("the label is -1, which marks rows without a label", way_out)
    if is_unlabelled(value, labels):
        raise RowFault("the label is missing", "give every row a label")
    number = find_number(value, labels)
    if number is None:
        shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
        raise RowFault(f"the label {value!r:.40} is not one of the labels ({shown})", "correct it, or set task.labels")
    return number


def _ordered(counts: Iterable[int | str], names: Mapping[int | str, set[str]], where: str) -> tuple[str, ...]:
    kinds = {type(value) for value in counts}
    if kinds == {int, str}:
        examples = ", ".join(repr(next(value for value in counts if type(value) is kind)) for kind in (int, str))
        rule = f"some labels are integers and some are strings (such as {examples})"
        raise RequestError.of(where, rule, "use either integers or strings for all labels")
    ordered = sorted(counts, key=lambda value: (value != OUTSIDE, value))
    if kinds == {int} and ordered == list(range(len(ordered))):
        texts = [names.get(value, set()) for value in ordered]
        flat = [text for found in texts for text in found]
        if all(len(found) == 1 for found in texts) and len(set(flat)) == len(flat):
            return tuple(flat)
    return tuple(str(value) for value in ordered)
