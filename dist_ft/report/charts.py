"""Charts of the metrics of one or several runs, as Plotly figures with a description for who cannot see them."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go

from .curves import OF_LAYER, Curve
from .folder import RunFolder

COLORS = ("#3b7dd8", "#d9680f", "#1f9d63", "#c2478f", "#8a63d2", "#9a7d0a", "#0f97a7", "#d34a4a")
DASHES = ("solid", "dot", "dash", "dashdot")
SIGNIFICANT_DIGITS = 6


class Measure(NamedTuple):
    """How a metric is shown."""

    section: str
    title: str
    unit: str = ""
    scale: float = 1.0  # the shown value is the metric times this


QUALITY, UPDATES, SPEED, EXPERTS = "Loss and scores", "Optimization", "Speed and memory", "Experts"
SECTIONS = (QUALITY, UPDATES, SPEED, EXPERTS)
MEASURES: Mapping[str, Measure] = {
    "train/learning_rate": Measure(UPDATES, "Learning rate"),
    "train/grad_norm": Measure(UPDATES, "Gradient norm before clipping"),
    "train/supervised_tokens": Measure(UPDATES, "Supervised tokens per step", "tokens"),
    "train/epsilon": Measure(UPDATES, "Spent privacy budget", "epsilon"),
    "perf/tokens_per_second": Measure(SPEED, "Throughput of all workers", "tokens/s"),
    "perf/step_time_s": Measure(SPEED, "Time per step", "s"),
    "perf/data_wait_share": Measure(SPEED, "Share of a step spent waiting for data", "%", 100.0),
    "perf/peak_memory_bytes": Measure(SPEED, "Peak memory of rank 0", "GiB", 2.0**-30),
    "perf/mfu": Measure(SPEED, "Model FLOPs utilization", "%", 100.0),
    "moe/load_max": Measure(EXPERTS, "Load of the busiest expert", "× mean"),
    "moe/load_min": Measure(EXPERTS, "Load of the idlest expert", "× mean"),
    "moe/dead_experts": Measure(EXPERTS, "Experts without a token", "experts"),
    "moe/router_entropy": Measure(EXPERTS, "Entropy of the routers", "nats"),
    "moe/aux_loss": Measure(EXPERTS, "Balance loss"),
    "moe/z_loss": Measure(EXPERTS, "z-loss"),
}
LOSS_TITLE, LOSS_BY_SET = "Loss", "Loss by data set"
WORST_IS_LOW = ("load_min", "router_entropy")  # of these, a cell of a heat map shows the smallest value


class Series(NamedTuple):
    """A curve with its name in the legend."""

    name: str
    curve: Curve
    color: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    """A figure with a title, a text that replaces it for screen readers, and a note."""

    title: str
    description: str
    figure: Mapping[str, Any]  # `data` and `layout` of Plotly, as JSON types
    note: str = ""


def charts_of(runs: Sequence[RunFolder]) -> dict[str, list[Chart]]:
    """Return the charts by section, for the metrics that some run has; several runs are laid over each other."""
    found: dict[str, list[Chart]] = {section: [] for section in SECTIONS}
    groups: dict[tuple[str, str], dict[str, Measure]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.curves):
        if name != "epoch" and not OF_LAYER.fullmatch(name):
            measure = measure_of(name, sets_of_runs(runs))
            groups.setdefault((measure.section, measure.title), {})[name] = measure
    for (section, title), names in sorted(groups.items(), key=lambda group: _place(group[0][1])):
        series = list(series_of(runs, sorted(names, key=lambda name: not name.startswith("train/"))))
        measure = next(iter(names.values()))
        found[section].append(line_chart(title, measure, series))
    found[EXPERTS] += [chart for run in runs for chart in heat_maps(run, name_run=len(runs) > 1)]
    return {section: charts for section, charts in found.items() if charts}


def sets_of_runs(runs: Sequence[RunFolder]) -> set[str]:
    """Return the names of the data sets of mixtures, which end the names of their metrics."""
    return {name for run in runs for name in run.plan.config.data.mixture or ()}


def measure_of(metric: str, sets: set[str]) -> Measure:
    """Return how a metric is shown; metrics of one title share a chart."""
    if metric in MEASURES:
        return MEASURES[metric]
    group, _, name = metric.partition("/")
    score, _, part = name.rpartition("/")
    if part not in sets:
        score, part = name, ""
    if score == "loss":
        return Measure(QUALITY, LOSS_BY_SET if part else LOSS_TITLE)
    if group == "eval":
        return Measure(QUALITY, _title(score))
    sections = {"train": UPDATES, "perf": SPEED, "moe": EXPERTS}
    return Measure(sections.get(group, UPDATES), _title(name or metric))


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _place(title: str) -> int:
    """Return where a chart stands among others: losses, then known measures, then the rest as it was logged."""
    titles = [LOSS_TITLE, LOSS_BY_SET, *(measure.title for measure in MEASURES.values())]
    return titles.index(title) if title in titles else len(titles)


def series_of(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[Series]:
    """Yield the curves of the metrics of a chart: colors tell runs apart, or metrics if there is one run."""
    for r, run in enumerate(runs):
        for n, name in enumerate(names):
            if name not in run.curves:
                continue
            if len(runs) == 1:
                yield Series(name, run.curves[name], n, n // len(COLORS))
            else:
                shown = run.name if len(names) == 1 else f"{run.name}: {name}"
                yield Series(shown, run.curves[name], r, n)


def line_chart(title: str, measure: Measure, series: Sequence[Series]) -> Chart:
    """Draw curves over steps."""
    figure = go.Figure()
    for one in series:
        points = one.curve.points()
        sparse = len(points) <= 15
        figure.add_trace(
            go.Scatter(
                x=[point.step for point in points],
                y=[_round(point.value * measure.scale) for point in points],
                name=html.escape(one.name),
                mode="lines+markers" if sparse else "lines",
                line={"color": COLORS[one.color % len(COLORS)], "dash": DASHES[one.dash % len(DASHES)], "width": 2},
                marker={"size": 5},
                hovertemplate="%{y:.5~g}",
            )
        )
    figure.update_layout(
        template="none",
        hovermode="x unified",
        showlegend=len(series) > 1,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        margin={"l": 60, "r": 16, "t": 16, "b": 44},
        xaxis={"title": {"text": "step"}, "automargin": True},
        yaxis={"title": {"text": measure.unit}, "automargin": True, "exponentformat": "power", "zeroline": False},
    )
    unit = f" in {measure.unit}" if measure.unit else ""
    told = ". ".join(describe_curve(one.name, one.curve, measure.scale) for one in series)
    return Chart(title, f"Line chart of {title.lower()}{unit} by step. {told}.", _plain(figure), _note(series))


def describe_curve(name: str, curve: Curve, scale: float = 1.0) -> str:
    """Say in words where a curve begins, where it ends, and between which values it lies."""
    first, last, low, high = curve.first, curve.last, curve.lowest, curve.highest
    assert first and last and low and high, "a curve has a point"
    values = [f"{point.value * scale:.4g} at step {point.step}" for point in (first, last, low, high)]
    if curve.count == 1:
        return f"{name}: {values[0]}"
    return f"{name}: from {values[0]} to {values[1]}; lowest {values[2]}, highest {values[3]}"


def _note(series: Sequence[Series]) -> str:
    notes = []
    if any(one.curve.is_thinned for one in series):
        most = max(one.curve.count for one in series)
        notes.append(f"Drawn from the smallest and largest values of intervals, of {most:,} points.")
    if missing := sum(one.curve.missing for one in series):
        notes.append(f"{missing:,} value{'s were' if missing > 1 else ' was'} not finite.")
    return " ".join(notes)


def heat_maps(run: RunFolder, *, name_run: bool) -> Iterator[Chart]:
    """Yield a heat map over layers and steps for each metric that is logged for every mixture of experts."""
    by_metric: dict[str, dict[int, Curve]] = {}
    for name, curve in run.curves.items():
        if (match := OF_LAYER.fullmatch(name)) is not None:
            by_metric.setdefault(match[2], {})[int(match[1])] = curve
    for metric, layers in by_metric.items():
        measure = MEASURES.get(f"moe/{metric}", Measure(EXPERTS, _title(metric)))
        of = f" ({run.name})" if name_run else ""
        yield heat_map(f"{measure.title}, by layer{of}", metric, measure.unit, layers)


def heat_map(title: str, metric: str, unit: str, layers: Mapping[int, Curve]) -> Chart:
    """Draw the value of each layer (rows) in each interval of steps (columns)."""
    rows = sorted(layers)
    low = metric in WORST_IS_LOW
    cells = {
        layer: {b.first_step: _round((b.low if low else b.high).value) for b in layers[layer].buckets} for layer in rows
    }
    steps = sorted({step for row in cells.values() for step in row})
    figure = go.Figure(
        go.Heatmap(
            x=list(map(str, steps)),
            y=list(map(str, rows)),
            z=[[cells[layer].get(step) for step in steps] for layer in rows],
            colorscale="Viridis",
            reversescale=low,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
            hovertemplate="step %{x}, layer %{y}: %{z:.4~g}<extra></extra>",
        )
    )
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 16, "t": 16, "b": 44},
        xaxis={"title": {"text": "step"}, "type": "category", "nticks": 8, "automargin": True},
        yaxis={"title": {"text": "layer"}, "type": "category", "autorange": "reversed", "nticks": 16},
    )
    worst = min if low else max
    layer, point = worst(
        ((layer, layers[layer].lowest if low else layers[layer].highest) for layer in rows),
        key=lambda pair: pair[1].value if pair[1] else 0.0,
    )
    assert point is not None, "a curve has a point"
    kind = "smallest" if low else "largest"
    told = f"The {kind} value is {point.value:.4g}, in layer {layer} at step {point.step}"
    note = f"Each cell shows the {kind} value of its steps." if layers[rows[0]].is_thinned else ""
    return Chart(title, f"Heat map of {len(rows)} layers over steps. {told}.", _plain(figure), note)


def bar_chart(title: str, names: Sequence[str], values: Mapping[str, Sequence[float]]) -> Chart:
    """Draw horizontal bars in percent: one group for each name, one bar for each entry of `values`."""
    figure = go.Figure()
    for i, (label, shares) in enumerate(values.items()):
        figure.add_trace(
            go.Bar(
                x=[_round(100 * share) for share in shares],
                y=[html.escape(name) for name in names],
                name=html.escape(label),
                orientation="h",
                marker={"color": COLORS[i % len(COLORS)]},
                hovertemplate="%{y}: %{x:.4~g} %",
            )
        )
    figure.update_layout(
        template="none",
        barmode="group",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        margin={"l": 60, "r": 16, "t": 16, "b": 44},
        xaxis={"title": {"text": "%"}, "rangemode": "tozero"},
        yaxis={"automargin": True, "autorange": "reversed", "type": "category"},
    )
    told = "; ".join(
        f"{name}: " + ", ".join(f"{label} {shares[i]:.1%}" for label, shares in values.items())
        for i, name in enumerate(names)
    )
    return Chart(title, f"Bar chart. {told}.", _plain(figure))


def _round(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _plain(figure: go.Figure) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = figure.to_plotly_json()
    return {"data": list(plain["data"]), "layout": plain["layout"]}
