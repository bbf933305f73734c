"""Tables of the report: what the folder says besides curves, as rows of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..track.secrets import NEVER_SHOWN, hide_secrets, shown_settings
from .curves import evaluated
from .folder import RunFolder

LONGEST_CELL = 600  # characters
MOST_COLUMNS = 8  # of a table of predictions


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows. `numeric` columns (by index) are aligned to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    note: str = ""


def scores_table(runs: Sequence[RunFolder]) -> Table | None:
    """Return the metrics of the evaluations: first, best and last of one run, or the last of each of several."""
    names = list(dict.fromkeys(name for run in runs for name in evaluated(dict(run.curves))))
    if not names:
        return None
    if len(runs) > 1:
        rows = [[name, *(_last(run, name) for run in runs)] for name in names]
        return Table("Last evaluation", ["metric", *labels_of(runs)], rows, _right(1, len(runs)))
    curves = runs[0].curves
    rows = []
    for name in names:
        points = (curves[name].first, curves[name].lowest, curves[name].highest, curves[name].last)
        rows.append([name, *(f"{point.value:.5g} (step {point.step:,})" for point in points if point)])
    return Table("Evaluations", ["metric", "first", "lowest", "highest", "last"], rows, _right(1, 4))


def final_table(runs: Sequence[RunFolder]) -> Table:
    """Return how each run stands, and the last values of what was measured while training."""
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.curves)
        if name.startswith(("train/", "perf/")) and name.count("/") == 1
    ]
    rows = [["status", *(run.status for run in runs)], ["step", *(f"{run.step:,}" for run in runs)]]
    rows += [[name, *(_last(run, name) for run in runs)] for name in names]
    return Table("Last step", ["", *labels_of(runs)], rows, _right(1, len(runs)))


def labels_of(runs: Sequence[RunFolder]) -> list[str]:
    """Return the names of the runs, numbered where two are the same."""
    names = [run.name for run in runs]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def differences_table(runs: Sequence[RunFolder]) -> Table:
    """Return the keys whose values differ between the runs, and what was planned from them."""
    settings = [{**flat(shown_settings(run.plan.config)), **_planned(run)} for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = []
    for key in keys:
        values = [shown(one[key]) if key in one else "–" for one in settings]
        if len(set(values)) > 1:
            rows.append([key, *values])
    note = "" if rows else "The configurations are the same."
    return Table("Differences of the configuration", ["key", *labels_of(runs)], rows, note=note)


def _planned(run: RunFolder) -> dict[str, Any]:
    plan = run.plan
    return {"workers": plan.world_size, "micro-batches per step": plan.accumulation_steps, "git": plan.git_sha}


def configuration_table(run: RunFolder) -> Table:
    """Return every key with its value and the origin of the value."""
    origins = {key: text for key, text in run.plan.origins.items() if not is_never_shown(key)}
    settings = flat(shown_settings(run.plan.config))
    rows = [[key, shown(value), hide_secrets(origins.pop(key, "default"))] for key, value in settings.items()]
    rows += [[key, "–", hide_secrets(text)] for key, text in origins.items()]
    return Table("All keys", ["key", "value", "origin"], rows)


def is_never_shown(key: str) -> bool:
    """Return whether a dotted key may hold a secret."""
    group, _, name = key.partition(".")
    return name.partition(".")[0] in NEVER_SHOWN.get(group, ())


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys; empty mappings and all other values stay as they are."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def data_tables(run: RunFolder) -> Iterator[Table]:
    """Yield the account of each split: rows read, dropped by cause and kept, tokens and supervised tokens."""
    for split, account in run.record.get("data", {}).items():
        for name, own in account.get("sets", {"": account}).items():
            yield Table(
                f"data.{split}" + (f" ({name})" if name else ""), ["", "count", ""], list(_account_rows(own)), _right(1)
            )


def _account_rows(account: Mapping[str, Any]) -> Iterator[list[str]]:
    def row(label: str, key: str, text: str = "") -> Iterator[list[str]]:
        if account.get(key):
            yield [label, f"{account[key]:,}", text]

    yield from row("rows in the source", "rows_of_source", "of which some were chosen")
    yield ["rows read", f"{account.get('rows_read', 0):,}", ", ".join(account.get("formats", ()))]
    for name, rows in account.get("files", {}).items():
        yield ["of file", f"{rows:,}", name]
    if (more := account.get("file_count", 0) - len(account.get("files", {}))) > 0:
        yield ["of further files", f"{more:,}", "files"]
    for cause, rows in account.get("dropped", {}).items():
        yield ["rows dropped", f"{rows:,}", cause]
    yield from row("rows augmented", "augmented")
    for cause, rows in account.get("copies_left_out", {}).items():
        yield ["copies left out", f"{rows:,}", cause]
    yield ["rows kept", f"{account.get('rows_kept', 0):,}", ""]
    yield from row("rows repeated", "repeated", "have the same tokens as an earlier row")
    yield from row("rows truncated", "truncated_rows", f"{account.get('truncated_tokens', 0):,} tokens were cut off")
    yield ["tokens", f"{account.get('tokens', 0):,}", f"longest row {account.get('longest', 0):,}"]
    yield from row("tokens left over", "tokens_left_over", "in a block without supervised tokens")
    supervised, tokens = account.get("supervised_tokens", 0), account.get("tokens", 0)
    yield ["supervised tokens", f"{supervised:,}", f"{supervised / max(1, tokens):.0%} of the tokens enter the loss"]
    yield ["samples", f"{account.get('samples', 0):,}", str(account.get("layout", ""))]


def mixture_table(run: RunFolder) -> Table | None:
    """Return how often each set of a mixture is seen, and its shares."""
    rows = [
        [
            one["name"],
            f"{one['samples']:,}",
            f"{one['seen']:,}",
            f"{one['times']:.2f}",
            f"{one['share']:.2%}",
            f"{one['token_share']:.2%}",
        ]
        for one in run.record.get("mixture", ())
    ]
    head = ["data set", "samples", "seen", "epochs", "share of samples", "share of supervised tokens"]
    return Table("Mixture over the run", head, rows, _right(1, 5)) if rows else None


def memory_table(run: RunFolder) -> Table | None:
    """Return the memory that was estimated for a rank, by part, and the largest that was measured on rank 0."""
    parts = run.record.get("memory", ())
    if not parts:
        return None
    rows = [[part["name"], size(part["device"]), size(part["host"]), part["why"]] for part in parts]
    device, host = sum(part["device"] for part in parts), sum(part["host"] for part in parts)
    rows.append(["estimated", size(device), size(host), "without activations and buffers"])
    measured = run.curves.get("perf/peak_memory_bytes")
    if measured is not None and measured.highest is not None:
        on_cpu = set(run.record.get("devices", ())) == {"cpu"}
        what = "peak of the process of rank 0, with its libraries" if on_cpu else "peak of the tensors of rank 0"
        rows.append(["measured", size(measured.highest.value), "", what])
    where = "memory" if set(run.record.get("devices", ())) == {"cpu"} else "device"
    return Table("Memory of a rank", ["part", where, "host", ""], rows, _right(1, 2))


def result_tables(run: RunFolder) -> Iterator[Table]:
    """Yield the results of `dist-ft eval`: one column per model."""
    kinds = {"metrics": "", "general": " on general text", "lm_eval": " by lm-eval"}
    for file, content in run.evaluations.items():
        for kind, words in kinds.items():
            found = content.get(kind)
            if not isinstance(found, Mapping) or not all(isinstance(one, Mapping) for one in found.values()):
                continue
            names = dict.fromkeys(name for metrics in found.values() for name in metrics)
            rows = [[name, *(shown(metrics.get(name, "–")) for metrics in found.values())] for name in names]
            if rows:
                yield Table(f"{file}{words}", ["metric", *found], rows, _right(1, len(found)))


def prediction_tables(run: RunFolder) -> Iterator[Table]:
    """Yield the first predictions of each file."""
    for file, rows in run.predictions.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))[:MOST_COLUMNS]
        if columns:
            cells = [[shown(row[key]) if key in row else "" for key in columns] for row in rows]
            yield Table(f"{file}, first {len(rows)}" if len(rows) > 1 else file, columns, cells)


def environment_table(run: RunFolder) -> Table:
    """Return versions, devices, and what the plan says of its origin."""
    record = run.record
    devices = ", ".join(f"{count} × {name}" for name, count in record.get("devices", {}).items())
    rows = [["devices", devices]] if devices else []
    rows += [["platform", record["platform"]]] if "platform" in record else []
    rows += [[name, version] for name, version in record.get("versions", {}).items()]
    nodes = f"{run.plan.nodes} node{'s' * (run.plan.nodes > 1)}"
    rows += [
        ["workers", f"{run.plan.world_size} on {nodes}"],
        ["git", run.plan.git_sha or "not a git checkout"],
        ["planned", run.plan.created],
        *([["started", record["started"]]] if "started" in record else []),
    ]
    return Table("Environment", ["", "value"], rows)


def checkpoints_table(run: RunFolder) -> Table | None:
    """Return the checkpoints that are kept."""
    rows = [[one.name, size(one.size), ", ".join(one.notes)] for one in run.checkpoints]
    return Table("Checkpoints", ["checkpoint", "size", ""], rows, _right(1)) if rows else None


def shown(value: Any) -> str:
    """Return a value as text: numbers with five digits, objects as JSON, long texts cut."""
    if isinstance(value, float):
        return f"{value:.5g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} … ({len(text):,} characters)"


def size(count: float) -> str:
    """Return a number of bytes in a unit that fits; empty for 0."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,.0f} B" if count else ""


def cause_of(run: RunFolder) -> str:
    """Return the report of a failure or stop, without secrets and paths of the machine."""
    text = hide_secrets(str(run.failure.get("report", "")))
    for folder in {str(run.path), str(run.path.absolute()), str(run.plan.run_dir)}:
        text = text.replace(f"{folder}/", "")
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+(?=[^\s/:'\"]+)", "…/", text)


def _last(run: RunFolder, name: str) -> str:
    curve = run.curves.get(name)
    if curve is None or curve.last is None:
        return "–"
    return size(curve.last.value) if name.endswith("_bytes") else f"{curve.last.value:.5g}"


def _right(first: int, last: int | None = None) -> frozenset[int]:
    return frozenset(range(first, (first if last is None else last) + 1))
