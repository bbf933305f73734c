"""The page: read by html.parser, with the sections that have data, and no text that could run."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from dist_ft.report.folder import read_folder
from dist_ft.report.page import page_of, policy_of, render
from tests.reports import ACCOUNT, RECORD, finish, write_run

EVIL = '</script><img src=x onerror="alert(1)"><script>alert(2)</script>'


class Parsed(HTMLParser):
    """The parts of a page."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif inside in ("h1", "h2", "h3"):
            self.headings[-1] += data
        elif inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data

    def table_with(self, head: str) -> list[list[str]]:
        """The table whose head has this column."""
        (found,) = [table for table in self.tables if head in table[0]]
        return found


def parse(*runs: Path) -> Parsed:
    return Parsed(render(page_of([read_folder(run) for run in runs])))


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", experts=True)
    finish(run)
    (run / "eval-validation.json").write_text(
        json.dumps({"metrics": {"base": {"loss": 2.5}, "export": {"loss": 1.25}}})
    )
    (run / "predictions-validation.jsonl").write_text('{"sample": 0, "answer": "forty two"}\n')
    page = parse(run)
    assert page.headings[0] == "run "  # its status is in an element of its own
    for title in (
        "Loss and scores", "Loss", "Exact match", "Optimization", "Learning rate", "Speed and memory", "Experts",
        "Load of the busiest expert, by layer", "Data", "Model and checkpoints", "Environment", "Configuration",
        "Results of dist-ft eval",
    ):  # fmt: skip
        assert title in page.headings
    assert "Cause of the failure" not in page.headings
    assert ["rows dropped", "3", "the text is empty"] in page.tables[[t[0][1] for t in page.tables].index("count")]
    memory = {row[0]: row[1] for row in page.table_with("device")}
    assert memory["estimated"] == "4.00 GiB" and memory["measured"] == "5.50 GiB"
    assert page.table_with("origin")[1:] and ["method.r", "4", "command line"] in page.table_with("origin")
    assert ["loss", "2.5", "1.25"] in page.table_with("base")
    assert ["0", "forty two"] in page.table_with("answer")
    assert ["step-60", "4.00 KiB", "latest"] in page.table_with("checkpoint")
    assert any(["devices", "2 × NVIDIA H100 80GB HBM3"] in table for table in page.tables)


def test_sections_without_data_do_not_appear(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={})
    (run / "metrics.jsonl").unlink()
    page = parse(run)
    assert page.headings[1:] == ["Environment", "Configuration"]
    assert not any(attributes.get("role") == "img" for _, attributes in page.tags)
    assert len(page.scripts) == 2, "Plotly is left out of a page without charts"


def test_no_text_runs_and_nothing_is_loaded(tmp_path: Path) -> None:
    shares = {"samples": 1, "seen": 1, "times": 1.0, "share": 1.0, "token_share": 1.0}
    record = {
        **RECORD,
        "versions": {EVIL: EVIL},
        "data": {EVIL: {**ACCOUNT, "dropped": {EVIL: 1}}},
        "mixture": [{"name": EVIL, **shares}],
    }
    run = write_run(tmp_path / "run", record=record, model={"name_or_path": EVIL})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, f"eval/{EVIL}": 1.0, f"moe/layer_1/{EVIL}": 1.0, f"moe/{EVIL}": 2.0}) + "\n")
    (run / "failure.json").write_text(json.dumps({"exit_code": 4, "report": EVIL}))
    (run / f"predictions-{EVIL.replace('/', '')}.jsonl").write_text(json.dumps({EVIL: EVIL}) + "\n")
    (run / "eval-test.json").write_text(json.dumps({"metrics": {EVIL: {EVIL: 1.0}}}))
    for page in (parse(run), parse(run, run)):
        tags = [tag for tag, _ in page.tags]
        assert tags.count("script") == 3 and "img" not in tags and "iframe" not in tags
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert not {"src", "href"} & set(attributes) or str(attributes.get("href")).startswith("#")
        assert any(EVIL in cell for table in page.tables for row in table for cell in row), "the text itself is shown"
        assert json.loads(page.scripts[0][1]), "data stays JSON"


def test_the_policy_allows_the_scripts_of_the_page_alone(tmp_path: Path) -> None:
    page = parse(write_run(tmp_path / "run"))
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-") and "http" not in str(policy)
    runs = [text for attributes, text in page.scripts if "type" not in attributes]
    for text in runs:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in str(policy)
    assert str(policy).count("sha256-") == len(runs) == 2
    assert policy_of("x") != policy_of("y")


def test_charts_have_a_text_and_tables_have_headers(tmp_path: Path) -> None:
    page = parse(write_run(tmp_path / "run", experts=True))
    charts = [a for _, a in page.tags if a.get("role") == "img"]
    figures = json.loads(page.scripts[0][1])
    assert len(charts) == len(figures) > 8
    assert [a["id"] for a in charts] == [f"chart-{i}" for i in range(len(figures))]
    assert all(len(str(a["aria-label"])) > 40 for a in charts)
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("caption") == len(page.tables)
    assert page.headings and ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_no_secret_is_shown(tmp_path: Path) -> None:
    lines = {"setup": ["export A=s3cr3t"], "sbatch": {"x": "s3cr3t"}}
    run = write_run(
        tmp_path / "run",
        launch={"name": "slurm", "nodes": 1, "workers_per_node": 2, **lines},
        data={"train": "https://me:s3cr3t@host/rows.jsonl?token=s3cr3t", "format": "tokens"},
    )
    (run / "failure.json").write_text(json.dumps({"exit_code": 4, "report": "GET https://h/x?api_key=s3cr3t failed"}))
    text = render(page_of([read_folder(run)])) + render(page_of([read_folder(run), read_folder(run)]))
    assert "s3cr3t" not in text and "[hidden]" in text and "launch.setup" not in text


def test_runs_side_by_side(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", steps=40, method={"name": "lora", "r": 8})
    finish(one)
    page = parse(one, two)
    assert page.headings[0] == "one · two"
    differences = {row[0]: row[1:] for row in page.table_with("key")[1:]}
    assert differences["method.r"] == ["4", "8"] and "method.name" not in differences
    results = {row[0]: row[1:] for table in page.tables for row in table}
    assert results["status"] == ["finished", "ended"] and results["step"] == ["60", "40"]
    assert results["eval/loss"] == ["1.4", "1.6"]
    assert results["perf/peak_memory_bytes"] == ["5.50 GiB", "5.50 GiB"]


@pytest.mark.parametrize("text", ["at /opt/env/lib/python3/site-packages/dist_ft/loop.py:12 in fit"])
def test_a_cause_has_no_path_of_the_machine(text: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "failure.json").write_text(json.dumps({"exit_code": 4, "report": f"log: {run}/logs/rank-0.log\n{text}"}))
    (cause,) = [s.text for s in page_of([read_folder(run)]).sections if s.text]
    assert cause == "log: logs/rank-0.log\nat …/loop.py:12 in fit"
