"""Conversion of raw rows in all supported formats to a few canonical forms.

| canonical row | source formats |
| --- | --- |
| `{"text": str}` | text |
| `{"messages": [...], "tools": […], "context": n}` | messages, sharegpt, alpaca, prompt_completion with message lists |
| `{"prompt": str, "completion": str}` | prompt_completion with plain strings, used without a chat template |
| `{"text": str, "text_pair": str, "label": str or int or list of them, "label_text": str}` | labelled |
| `{"tokens": [str, …], "tags": [str or int, …]}` | tagged |
| `{"source": str, "target": str, "references": [str]}` | source_target |
| `{"context": str, "question": str, "answers": {"text": [str], "answer_start": [int or null]}, "id": str}` | squad |
| `{"prompt", "chosen", "rejected"}`, all strings or all lists of messages, the columns of messages | pairs |
| `{"input_ids": [...], "labels": [...]}` | tokens |

`tools`, `context` and `chat_template_kwargs` (variables of the template, an object) of messages, `text_pair`,
`references`, `label_text` and `id` are optional. The first `context` messages are not supervised.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.run import RunConfig
from ...errors import Problem, RequestError
from .answers import ANSWERS, answers_of
from .faults import InvalidRow, check_text
from .fill import fill
from .messages import RowShape, check_messages, check_tools, check_variables, messages_of_alpaca, messages_of_sharegpt
from .pairs import pair_of, refuse_rejected
from .rows import RawRow

IGNORED_LABEL = -100
NO_LABEL = -1  # marks rows without a label in Hub datasets
VARIABLES = "chat_template_kwargs"  # column of a row's own variables of the chat template, named as in TRL


@dataclass(frozen=True)
class Format:
    """Columns of a format: all of `required` (`a|b` means either one) and any of `optional`. Others are ignored."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    tasks: tuple[str, ...]

    def fits(self, columns: Any) -> bool:
        """Return whether `columns` contains all required columns of this format."""
        return all(any(name in columns for name in names.split("|")) for names in self.required)

    @property
    def columns(self) -> list[str]:
        """All column names that the format reads."""
        return [name for names in (*self.required, *self.optional) for name in names.split("|")]


def detect(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, task: str | None = None) -> str | None:
    """Return the format whose required columns the row has after renaming by `columns`, or None.

    If several formats match, those supported by `task` come first, then the order of `FORMATS` decides.
    """
    return _detect(tuple(row), tuple(columns or ()), task)


@functools.lru_cache(maxsize=256)  # the rows of a file mostly have the same columns
def _detect(row: tuple[str, ...], columns: tuple[str, ...], task: str | None) -> str | None:
    renamed = {*row, *columns}
    fitting = [name for name, form in FORMATS.items() if form.fits(renamed) and set(columns) <= set(form.columns)]
    return next((name for name in fitting if task in FORMATS[name].tasks), fitting[0] if fitting else None)


def normalise(row: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Convert a raw row to its canonical form.

    Args:
        row: Raw row.
        format: Key of `FORMATS`, or `auto`.
        columns: Column name of the format -> column name in the data.

    Raises:
        InvalidRow: The columns or values of the row do not match the format.
        RequestError: `columns` has a column that the format does not have.
    """
    name = detect(row, columns) if format == "auto" else format
    if name is None:
        raise _no_format(row, columns)
    form = FORMATS[name]
    if unknown := [key for key in columns if key not in form.columns]:
        rule = f"format {name} has no column {', '.join(unknown)}"
        raise RequestError(Problem("data.columns", rule, f"use its columns: {', '.join(form.columns)}"))
    if absent := [source for source in columns.values() if source not in row]:
        rule = f"the row has no column {', '.join(absent)}; its columns are {_listed(row)}"
        raise InvalidRow(rule, "set data.columns to column names of the rows")
    renamed = {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}
    if not form.fits(renamed):
        raise _misfit(renamed, name)
    try:
        return form.convert(renamed)
    except RowShape as fault:
        raise InvalidRow(f"format {name}: {fault}", fault.way_out, fault.seen) from fault


def normalise_for(config: RunConfig, row: RawRow) -> tuple[str, dict[str, Any]]:
    """Return the format of a row and its canonical form for the task of the run.

    Raises:
        InvalidRow: The row could not be read, lacks a column used by `data.template`, contains characters that are not
            Unicode text, does not match the configured format, or has a format that the task does not support.
    """
    if isinstance(row, InvalidRow):
        raise row
    data = config.data
    columns = {} if data.template else data.columns
    if data.template:
        row = fill(data.template, data.columns, row)
    name = (detect(row, columns, config.task.name) if data.format == "auto" else data.format) or "auto"
    canonical = normalise(row, name, columns)
    check_task(name, config.task.name)
    if name != "tokens":
        check_text(canonical)
    return name, canonical


def check_task(format: str, task: str) -> None:
    """Check that `task` supports rows of `format`.

    Raises:
        InvalidRow: The task does not support the format.
    """
    if task not in FORMATS[format].tasks:
        fitting = [name for name, form in FORMATS.items() if task in form.tasks]
        other = " or ".join(FORMATS[format].tasks)
        rule = f"format {format} is not supported with task={task}, which supports {', '.join(fitting)}"
        raise InvalidRow(rule, f"set task={other}, or set data.columns to match another format")


def is_unlabelled(label: Any, labels: Sequence[str] | None) -> bool:
    """Return whether a canonical label is missing; -1 is a class only if `task.labels` says so."""
    return label in (None, "") or (label == NO_LABEL and str(NO_LABEL) not in (labels or ()))


def _no_format(row: Mapping[str, Any], columns: Mapping[str, str]) -> InvalidRow:
    known = [f"{name} ({', '.join(form.required)})" for name, form in FORMATS.items()]
    rule = f"columns {_listed(row)} match no supported format"
    if columns:
        rule += f" (data.columns sets {', '.join(columns)})"
    return InvalidRow(rule, f"{_suggest(row)}; supported formats are {', '.join(known)}")


def _misfit(row: Mapping[str, Any], name: str) -> InvalidRow:
    missing = [names for names in FORMATS[name].required if not any(n in row for n in names.split("|"))]
    rule = f"format {name} requires {', '.join(missing)}; the columns are {_listed(row)}"
    found = detect(row)
    return InvalidRow(rule, f"set data.format={found}" if found else _suggest(row, name))


_USUAL = {  # common dataset column names for the columns of prompt_completion and text
    "prompt": ("question", "query", "input", "instruction", "source", "problem"),
    "completion": ("answer", "response", "output", "target", "solution", "summary"),
    "text": ("content", "body", "document", "article", "sentence"),
}


def _suggest(row: Mapping[str, Any], name: str | None = None) -> str:
    """Suggest `data.columns` that make the row match format `name`, or else prompt_completion or text."""
    wanted = [names.split("|")[0] for names in FORMATS[name].required] if name else ["prompt", "completion"]
    found = {ours: _nearest(ours, row) for ours in wanted}
    if not name and not all(found.values()):
        found = {"text": _nearest("text", row)}
    if all(found.values()):
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in found.items())
        return f"try 'data.columns={{{pairs}}}'"
    return "set data.columns={FORMAT_COLUMN: DATA_COLUMN}"


def _nearest(wanted: str, row: Mapping[str, Any]) -> str | None:
    for usual in _USUAL.get(wanted, ()):
        if usual in row:
            return usual
    near = difflib.get_close_matches(wanted, [str(name) for name in row], n=1, cutoff=0.6)
    return near[0] if near else None


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in row) or "(none)"


def _text(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": _string(row, "text")}


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    refuse_rejected(row)
    return _with_tools({"messages": check_messages(row["messages"])}, row)


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    refuse_rejected(row)
    return _with_tools({"messages": messages_of_sharegpt(row)}, row)


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    refuse_rejected(row)
    return {"messages": messages_of_alpaca(row)}


def _prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    refuse_rejected(row)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        both = {"messages": check_messages([*prompt, *completion]), "context": len(prompt)}
        return _with_tools(both, row)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowShape("prompt and completion must both be strings or both be lists of messages")
    return {"prompt": _string(row, "prompt"), "completion": _string(row, "completion")}


def _source_target(row: Mapping[str, Any]) -> dict[str, Any]:
    source = row["source"]
    if isinstance(source, list) and source and all(isinstance(word, str) for word in source):
        source = " ".join(source)  # datasets such as CommonGen give a list of concept words
    canonical: dict[str, Any] = {"source": _string({"source": source}, "source"), "target": _string(row, "target")}
    if (references := row.get("references")) is not None:
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise RowShape("references must be a list of strings")
        canonical["references"] = references
    return canonical


def _pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    return _with_tools(pair_of(row), row)


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    ids, labels = row["input_ids"], row["labels"]
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise RowShape(f"{name} must be a list of integers")
    if len(ids) != len(labels):
        raise RowShape(
            "input_ids and labels differ in number",
            "write one label for each token (-100: no loss)",
            f"{len(ids)} input_ids but {len(labels)} labels",
        )
    if any(not 0 <= value < 2**31 for value in ids):
        raise RowShape("an input id is negative or at least 2³¹")
    if any(value < 0 and value != IGNORED_LABEL or value >= 2**31 for value in labels):
        raise RowShape(f"a label is neither a token id nor {IGNORED_LABEL}")
    return {"input_ids": ids, "labels": labels}


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    given = next((row[name] for name in ("label", "labels", "label_text") if name in row), None)
    label = [_label(one) for one in given] if isinstance(given, list) else _label(given)
    canonical = {"text": _string(row, _first(row, TEXTS)), "label": label}
    if (pair := _first(row, PAIRS)) is not None:
        canonical["text_pair"] = _string(row, pair)
    if isinstance(row.get("label_text"), str):
        canonical["label_text"] = row["label_text"]
    return canonical


def _label(value: Any) -> int | str | None:
    """Return a label as an integer or string: `true` for True, 1 for 1.0, and None for NaN."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is not None and type(value) not in (int, str):
        rule = "the label is neither an integer nor a string"
        raise RowShape(rule, "use class labels, not scores", f"{value!r:.40}")
    return value


def _tagged(row: Mapping[str, Any]) -> dict[str, Any]:
    words, tags = row["tokens"], row[_first(row, TAGS)]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RowShape("tokens is not a list of strings", seen=f"{words!r:.40}")
    if not isinstance(tags, list):
        raise RowShape("the tags are not a list", seen=f"{tags!r:.40}")
    if len(words) != len(tags):
        way_out = "write one tag for each word"
        raise RowShape("tokens and tags differ in number", way_out, f"{len(words)} tokens but {len(tags)} tags")
    return {"tokens": words, "tags": [_label(tag) for tag in tags]}


def _squad(row: Mapping[str, Any]) -> dict[str, Any]:
    canonical = {name: _string(row, name) for name in ("context", "question")}
    given = {"id": str(row["id"])} if row.get("id") is not None else {}
    return {**canonical, **given, "answers": answers_of(row)}


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((name for name in names if name in row), None)


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise RowShape(f"{name} is not a string", seen=f"{value!r:.40}")
    return value


def _with_tools(canonical: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    tools, functions = check_tools(row.get("tools")), check_tools(row.get("functions"))
    if tools and functions:
        raise RowShape("the row has both tools and functions", "keep one of these columns")
    variables = check_variables(row.get(VARIABLES))
    more = {name: value for name, value in (("tools", tools or functions), (VARIABLES, variables)) if value}
    return {**canonical, **more}


TEXTS = ("text", "sentence", "sentence1", "premise", "question1")
PAIRS = ("text_pair", "sentence2", "hypothesis", "question2")
TAGS = ("ner_tags", "tags", "labels")
FORMATS: dict[str, Format] = {
    "tokens": Format(("input_ids", "labels"), (), _tokens, ("causal_lm", "instruction")),
    "messages": Format(("messages",), ("tools", "functions", VARIABLES), _messages, ("instruction",)),
    "sharegpt": Format(("conversations",), ("system", "tools", "functions", VARIABLES), _sharegpt, ("instruction",)),
    "prompt_completion": Format(
        ("prompt", "completion"), ("tools", "functions", VARIABLES), _prompt_completion, ("instruction", "seq2seq")
    ),
    "alpaca": Format(
        ("instruction", "output|response"), ("input", "context", "system", "history"), _alpaca, ("instruction",)
    ),
    "labelled": Format(
        ("|".join(TEXTS), "label|labels|label_text"), ("|".join(PAIRS),), _labelled, ("sequence_classification",)
    ),
    "tagged": Format(("tokens", "|".join(TAGS)), (), _tagged, ("token_classification",)),
    "squad": Format(
        ("context", "question", "|".join(ANSWERS)), ("id", "answer_start"), _squad, ("question_answering",)
    ),
    "source_target": Format(("source", "target"), ("references",), _source_target, ("seq2seq",)),
    "pairs": Format(
        ("chosen", "rejected"), ("prompt", "tools", "functions", VARIABLES), _pairs, ("preference", "reward")
    ),
    "text": Format(("text",), (), _text, ("causal_lm", "masked_lm")),
}
