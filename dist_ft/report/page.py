"""The page: which sections a report has, and its HTML.

Every text is escaped by the template. A content security policy allows the scripts of this package alone and no
connection, so that a text that slipped through could neither run nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from ..config.plan import EXPORT
from . import charts, tables
from .charts import Chart, bar_chart
from .folder import RunFolder
from .tables import Table

HERE = Path(__file__).parent
STATES = {
    "finished": "the model is exported, and was loaded again with the same logits",
    "running": "this page is written again about every minute; reload it",
    "stopped": "stopped on request; the same command goes on",
    "failed": "see the cause below",
    "ended": "no process of the run is left; the same command goes on from the last checkpoint",
    "planned": "no worker has started yet",
}


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    text: str = ""  # shown as it is, in a fixed width
    lines: Sequence[str] = ()  # commands
    folded: bool = False

    @property
    def anchor(self) -> str:
        """The id of the heading."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """Content of a report."""

    title: str
    status: str
    facts: Sequence[tuple[str, str]]  # label, value; shown first
    sections: Sequence[Section] = field(default_factory=list)
    read_at: str = ""


def page_of(runs: Sequence[RunFolder]) -> Page:
    """Return the page of a run, or of several runs side by side."""
    read_at = max(run.read_at for run in runs).strftime("%Y-%m-%d %H:%M:%S UTC")
    if len(runs) == 1:
        (run,) = runs
        shown = list(sections_of(run))
        return Page(run.name, run.status, list(facts_of(run)), shown, read_at)
    title = " · ".join(tables.labels_of(runs))
    return Page(title, "", [("runs", str(len(runs)))], list(sections_side_by_side(runs)), read_at)


def facts_of(run: RunFolder) -> Iterator[tuple[str, str]]:
    """Yield the first lines of a report."""
    config = run.plan.config
    yield "status", STATES[run.status]
    yield "model", f"{config.model.name_or_path} ({config.model.dtype})"
    yield "training", f"task {config.task.name}, method {config.method.name}, engine {config.engine.name}"
    limit = f" of {config.train.max_steps:,}" if config.train.max_steps else ""
    epoch = run.curves["epoch"].last if "epoch" in run.curves else None
    yield "step", f"{run.step:,}{limit}" + (f", epoch {epoch.value:.2f}" if epoch else "")
    for name in ("train/loss", "eval/loss"):
        if (curve := run.curves.get(name)) is not None and curve.first and curve.last:
            yield name, f"{curve.first.value:.4f} → {curve.last.value:.4f}"


def sections_of(run: RunFolder) -> Iterator[Section]:
    """Yield the sections of one run that have content."""
    if cause := tables.cause_of(run):
        yield Section("Cause of the stop" if run.status == "stopped" else "Cause of the failure", text=cause)
    found = charts.charts_of([run])
    scores = tables.scores_table([run])
    if scores is not None or charts.QUALITY in found:
        yield Section(charts.QUALITY, found.pop(charts.QUALITY, ()), [scores] if scores else ())
    if results := [*tables.result_tables(run), *tables.prediction_tables(run)]:
        yield Section("Results of dist-ft eval", tables=results)
    memory = tables.memory_table(run)
    for title in charts.SECTIONS[1:]:
        own = [memory] if memory is not None and title == charts.SPEED else []
        if title in found or own:
            yield Section(title, found.get(title, ()), own)
    mixture = tables.mixture_table(run)
    if data := [*([mixture] if mixture else ()), *tables.data_tables(run)]:
        yield Section("Data", shares_of(run), data)
    kept = tables.checkpoints_table(run)
    if commands := list(commands_of(run)):
        yield Section("Model and checkpoints", tables=[kept] if kept else (), lines=commands)
    yield Section("Environment", tables=[tables.environment_table(run)])
    yield Section("Configuration", tables=[tables.configuration_table(run)], folded=True)


def shares_of(run: RunFolder) -> list[Chart]:
    """Return the chart of a mixture's shares."""
    sets = run.record.get("mixture", ())
    if not sets:
        return []
    values = {
        "of samples": [one["share"] for one in sets],
        "of supervised tokens": [one["token_share"] for one in sets],
    }
    return [bar_chart("Shares of the mixture", [one["name"] for one in sets], values)]


def commands_of(run: RunFolder) -> Iterator[str]:
    """Yield the commands that use what the run has saved."""
    folder = run.plan.config.output_dir
    word = json.dumps(f"run={folder}") if any(c.isspace() for c in folder) else f"run={folder}"
    if run.exported:
        yield f'dist-ft generate {word} prompt="…"'
        yield f"dist-ft eval {word}"
        yield f"dist-ft export {word}" + ("" if run.plan.config.method.whole else " merge=true") + " out=exported"
        yield f"# the exported model, with the code that loads it in README.md: {folder}/{EXPORT}"
    elif run.checkpoints:
        yield f"dist-ft export {word} checkpoint=latest out=exported"


def sections_side_by_side(runs: Sequence[RunFolder]) -> Iterator[Section]:
    """Yield the sections of several runs."""
    scores = tables.scores_table(runs)
    shown = [tables.final_table(runs), *([scores] if scores is not None else ())]
    yield Section("Results", tables=shown)
    yield Section("Configuration", tables=[tables.differences_table(runs)])
    for title, found in charts.charts_of(runs).items():
        yield Section(title, found)


def render(page: Page) -> str:
    """Return the page as one self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    figures = [chart.figure for section in page.sections for chart in section.charts]
    script, library = asset("page.js"), get_plotlyjs() if figures else ""
    return environment.get_template("page.html.jinja").render(
        page=page,
        style=asset("page.css"),
        script=script,
        library=library,
        figures=json_in_html(figures),
        policy=policy_of(script, library),
    )


@cache
def asset(name: str) -> str:
    """Return a file of this folder."""
    return (HERE / name).read_text(encoding="utf-8")


def json_in_html(value: object) -> str:
    """Return JSON that is safe inside a script element: no `<` can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy_of(*scripts: str) -> str:
    """Return a content security policy that allows these scripts and nothing from the network."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts if text)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
