"""Charts hold the values of metrics.jsonl, in the unit that their axis names, and say them in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_ft.report.charts import EXPERTS, QUALITY, SPEED, UPDATES, Chart, charts_of
from dist_ft.report.folder import read_folder
from tests.reports import LAYERS, metrics_at, write_run


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def find(charts: dict[str, list[Chart]], title: str) -> Chart:
    (found,) = [chart for section in charts.values() for chart in section if chart.title == title]
    return found


def test_a_line_chart_has_the_logged_values(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    charts = charts_of([read_folder(run)])
    assert list(charts) == [QUALITY, UPDATES, SPEED], "no section without data"
    train, evaluation = find(charts, "Loss").figure["data"]
    assert (train["name"], evaluation["name"]) == ("train/loss", "eval/loss")
    wanted = [(line["step"], float(f"{line['train/loss']:.6g}")) for line in logged(run) if "train/loss" in line]
    assert list(zip(train["x"], train["y"], strict=True)) == wanted
    assert list(evaluation["x"]) == [0, 20, 40] and list(evaluation["y"]) == [2.0, 1.8, 1.6]
    text = find(charts, "Loss").description
    assert "eval/loss: from 2 at step 0 to 1.6 at step 40; lowest 1.6 at step 40, highest 2 at step 0" in text


def test_values_have_the_unit_of_their_axis(tmp_path: Path) -> None:
    charts = charts_of([read_folder(write_run(tmp_path / "run", steps=3))])
    memory, share = find(charts, "Peak memory of rank 0").figure, find(charts, "Model FLOPs utilization").figure
    assert set(memory["data"][0]["y"]) == {5.5} and memory["layout"]["yaxis"]["title"]["text"] == "GiB"
    assert set(share["data"][0]["y"]) == {41.0} and share["layout"]["yaxis"]["title"]["text"] == "%"


def test_a_heat_map_has_a_row_for_each_layer(tmp_path: Path) -> None:
    charts = charts_of([read_folder(write_run(tmp_path / "run", steps=12, experts=True))])
    chart = find(charts, "Load of the busiest expert, by layer")
    (trace,) = chart.figure["data"]
    assert list(trace["y"]) == [str(layer) for layer in range(LAYERS)]
    assert list(trace["x"]) == [str(step) for step in range(1, 13)]
    for layer, row in enumerate(trace["z"]):
        wanted = [metrics_at(step, experts=True)[f"moe/layer_{layer}/load_max"] for step in range(1, 13)]
        assert list(row) == [float(f"{value:.6g}") for value in wanted]
    assert "The largest value is 3.12, in layer 2 at step 12" in chart.description
    assert "The smallest value is 0.8, in layer 2" in find(charts, "Load of the idlest expert, by layer").description
    assert len(charts[EXPERTS]) == 3


def test_sets_of_a_mixture_share_a_chart_and_groups_of_scores_do_not(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        steps=0,
        data={"train": None, "format": "tokens", "mixture": {"a": {"train": "a.jsonl"}, "b": {"train": "b.jsonl"}}},
    )
    names = ("train/loss/a", "eval/loss/a", "eval/loss/b", "eval/f1/a", "eval/rewards/margins")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(names, 0.5)}) + "\n")
    charts = charts_of([read_folder(run)])[QUALITY]
    assert {chart.title: [trace["name"] for trace in chart.figure["data"]] for chart in charts} == {
        "Loss by data set": ["train/loss/a", "eval/loss/a", "eval/loss/b"],
        "F1": ["eval/f1/a"],
        "Rewards/margins": ["eval/rewards/margins"],
    }


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [read_folder(write_run(tmp_path / name, steps=steps)) for name, steps in (("one", 20), ("two", 10))]
    charts = charts_of(runs)
    rate = find(charts, "Learning rate").figure["data"]
    assert [(trace["name"], len(trace["x"])) for trace in rate] == [("one", 20), ("two", 10)]
    assert rate[0]["line"]["color"] != rate[1]["line"]["color"]
    loss = find(charts, "Loss").figure["data"]
    assert [trace["name"] for trace in loss] == [
        f"{run}: {of}/loss" for run in ("one", "two") for of in ("train", "eval")
    ]
    assert loss[0]["line"]["dash"] != loss[1]["line"]["dash"], "train and eval of a run differ by more than color"


def test_names_are_text_for_plotly(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/<b>x</b>": 1}) + "\n")
    (chart,) = charts_of([read_folder(run)])[QUALITY]
    assert chart.figure["data"][0]["name"] == "eval/&lt;b&gt;x&lt;/b&gt;"
