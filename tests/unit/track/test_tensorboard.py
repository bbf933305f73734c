"""TensorBoard: what its own reader finds in the event files of a run."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_ft.track.tensorboard import FOLDER, TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_metrics_have_the_names_of_metrics_jsonl_and_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, {"optim": {"learning_rate": 0.5}})
    for step in (1, 2, 3):
        first.log({"train/loss": 4.0 - step}, step=step)
    first.log({"eval/loss": 0.5}, step=3)
    first.close()
    second = TensorBoard(tmp_path, {}, after_step=2)
    second.log({"train/loss": 7.0}, step=3)
    second.close(RuntimeError("nan"))
    assert scalars(tmp_path / FOLDER)["train/loss"] == [(1, 3.0), (2, 2.0), (3, 7.0)]
    found = EventAccumulator(str(tmp_path / FOLDER))
    found.Reload()
    assert "configuration/text_summary" in found.Tags()["tensors"]
