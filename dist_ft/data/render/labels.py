"""Label names, found in the training split: what numbers they have is the same for every split and in the export."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...config.run import RunConfig
from ...errors import RequestError
from ...state import Facts
from ..read.chosen import Chosen, choose
from ..read.faults import RowFault
from ..read.formats import normalise_for
from ..read.rows import read_rows
from ..read.sets import name_in_mixture, sets_of

Labels = Callable[[Mapping[str, Any]], Iterable[tuple[int | str, str | None]]]  # of a row: values, and their names
NO_LABEL = -1  # by which sets of the hub mark rows whose label is not given
OUTSIDE = "O"  # of the IOB schemes: always number 0


def find_labels(config: RunConfig, labels_of: Labels) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """The names in the order of their numbers, how often each is met in data.train, and the number of its rows.

    Names are those of `task.labels`, or of the data: numbers in their order (named by `label_text` where every number
    has one), text in alphabetical order. The training rows of a mixture are those of all its sets.

    Args:
        config: of the run.
        labels_of: gives a canonical row's labels.

    Raises:
        RequestError: there are fewer than two labels, or the data mixes numbers and text.
    """
    seen: set[int | str] = set()  # of all rows, so that labels have one number in every fold and subset
    counts: Counter[int | str] = Counter()
    names: dict[int | str, set[str]] = {}
    rows = 0
    for name, alone in sets_of(config).items():
        chosen = _choose(name, alone)
        taken = None if chosen is None else set(chosen.rows.tolist())
        for at, (place, row) in enumerate(read_rows(alone.data.train or [], revision=alone.data.revision)):
            is_taken = taken is None or at in taken
            rows += is_taken
            with contextlib.suppress(RowFault):  # counted where the row is tokenised
                for value, text in labels_of(normalise_for(alone, row, place)[1]):
                    seen.add(value)
                    counts[value] += is_taken
                    if text is not None:
                        names.setdefault(value, set()).add(text)
    given: Sequence[str] | None = config.task.labels  # type: ignore[union-attr]
    where = "data.train" if config.data.mixture is None else "data.mixture"
    found = tuple(given) if given is not None else _ordered(seen, names, where)
    if len(found) < 2:
        rule = (
            f"{len(found)} label{'s' * (len(found) != 1)} in all ({', '.join(found) or 'none'}): nothing to tell apart"
        )
        raise RequestError.of(where, rule, "see data.columns: which column has the label?")
    tallies = [0] * len(found)
    for value, count in counts.items():
        number = find_number(value, found)
        if number is not None:
            tallies[number] += count
    return found, tuple(tallies), rows


def _choose(name: str, alone: RunConfig) -> Chosen | None:
    """The set's chosen rows; what is wrong is told of this set, whichever is being prepared."""
    try:
        return choose(alone, "train")
    except RequestError as error:
        raise RequestError(*(replace(p, where=name_in_mixture(p.where, name)) for p in error.problems)) from error


def head_settings(facts: Facts) -> dict[str, Any]:
    """What config.json says of a head with an output for each label."""
    names = dict(enumerate(facts.labels))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "pad_token_id": facts.pad_id,
    }


def find_number(value: int | str, labels: Sequence[str]) -> int | None:
    """The number of a label that is given by its name or its number; None for an unknown one."""
    if str(value) in labels:
        return labels.index(str(value))
    return value if isinstance(value, int) and 0 <= value < len(labels) else None


def number_of(value: Any, labels: Sequence[str]) -> int:
    """The number of a row's label.

    Raises:
        RowFault: it is missing, or not one of `labels`.
    """
    if value in (None, "", NO_LABEL):
        raise RowFault("the label is missing", "give every row a label")
    number = find_number(value, labels)
    if number is None:
        shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
        raise RowFault(f"the label {value!r:.40} is none of data.train's ({shown})", "correct it, or set task.labels")
    return number


def _ordered(counts: Iterable[int | str], names: Mapping[int | str, set[str]], where: str) -> tuple[str, ...]:
    kinds = {type(value) for value in counts}
    if kinds == {int, str}:
        examples = ", ".join(repr(next(value for value in counts if type(value) is kind)) for kind in (int, str))
        rule = f"some labels are numbers and some are text (such as {examples})"
        raise RequestError.of(where, rule, "write all of them alike")
    ordered = sorted(counts, key=lambda value: (value != OUTSIDE, value))
    if kinds == {int} and ordered == list(range(len(ordered))):
        texts = [names.get(value, set()) for value in ordered]
        flat = [text for found in texts for text in found]
        if all(len(found) == 1 for found in texts) and len(set(flat)) == len(flat):
            return tuple(flat)
    return tuple(str(value) for value in ordered)
