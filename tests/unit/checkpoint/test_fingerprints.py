"""What a run learns from is compared with its checkpoint: a change is refused with what changed, unless accepted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.checkpoint.fingerprints import accept_changes
from dist_ft.checkpoint.resume import Start, choose_start
from dist_ft.checkpoint.saver import save as save_checkpoint
from dist_ft.config.plan import Plan, make_plan
from dist_ft.config.run import RunConfig
from dist_ft.errors import RequestError
from dist_ft.export.card import card_of_run
from dist_ft.prepare import prepare
from dist_ft.process import comm
from dist_ft.process.place import Place, Worker
from dist_ft.state import NamedState, Progress
from dist_ft.track import trackers
from tests.runs import CHATS, chat_config, token_run

TOKENS = [list(range(1 + i, 13 + i)) for i in range(8)]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    comm.join(Place(), comm.open_store(Place(), 10), torch.device("cpu"), 10)
    yield
    comm.leave()


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def write_tokens(folder: Path, rows: list[list[int]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": t, "labels": [-100] * 6 + t[6:]}) + "\n" for t in rows))
    return path


def tokens_config(folder: Path, model: Path, method: str, **train: Any) -> RunConfig:
    data = str(folder / "rows.jsonl")
    config = token_run(folder / "run", str(model), data, "ddp", 1, 1, False, {"name": method})
    config["train"] |= train
    return RunConfig.model_validate(config)


def start_of(config: RunConfig, said: list[str] | None = None) -> Start:
    plan = plan_of(config)

    class Terminal:
        def write(self, text: str) -> None:
            (said if said is not None else []).append(text)

        def flush(self) -> None: ...

    worker = Worker(Place(), torch.device("cpu"), Terminal(), lambda phase: None)  # type: ignore[arg-type]
    return choose_start(plan, prepare(config), worker)


def plan_of(config: RunConfig) -> Plan:
    return make_plan(config, nodes=1, workers_per_node=1, origins={})


def save(config: RunConfig, progress: Progress) -> None:
    folder = Path(config.output_dir) / "checkpoints"
    step = progress.step + 3
    save_checkpoint(folder, NamedState({"model/a": torch.ones(2)}, updates=step), replace(progress, step=step))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


ONE_TOKEN = [*TOKENS[:5], [*TOKENS[5][:-1], 99], *TOKENS[6:]]
DATA = {
    "other rows": [[t + 1 for t in row] for row in TOKENS],
    "half of them": TOKENS[:4],
    "one token": ONE_TOKEN,
    "another order": TOKENS[::-1],
}


@pytest.mark.parametrize("rows", DATA.values(), ids=DATA)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_rows_are_refused_and_accepted_by_key(
    rows: list[list[int]], method: str, model: Path, tmp_path: Path
) -> None:
    write_tokens(tmp_path, TOKENS)
    first = tokens_config(tmp_path, model, method)
    begun = start_of(first)
    assert begun.path is None and begun.progress.accepted == ()
    save(first, begun.progress)
    same = start_of(first)
    assert same.path is not None and same.progress.accepted == () and same.progress.step == 3
    write_tokens(tmp_path, rows)
    with pytest.raises(RequestError) as refused:
        start_of(first)
    (problem,) = refused.value.problems
    assert (
        problem.where == "data.train"
        and "until step 3" in problem.rule
        and "train.accept_changes=[data]" in str(problem)
    )
    assert (
        "data.train: 8 rows, 96 tokens, " in problem.rule
        and f"→ {len(rows)} rows, {len(rows) * 12} tokens" in problem.rule
    )
    with pytest.raises(RequestError, match=r"data\.train"):
        start_of(tokens_config(tmp_path, model, method, accept_changes=["base", "tokenizer", "template"]))
    said: list[str] = []
    accepting = tokens_config(tmp_path, model, method, accept_changes=["data"])
    accepted = start_of(accepting, said).progress
    (change,) = accepted.accepted
    assert change.startswith("data.train changed after step 3: ") and change in "".join(said)
    save(accepting, accepted)
    again = start_of(first).progress  # the checkpoint of step 6 has the new fingerprints
    assert again.step == 6 and again.accepted == (change,)
    card = card_of_run(plan_of(first), prepare(first), Path(first.output_dir))
    assert change in card
    assert trackers._settings(plan_of(first), again)["accepted_changes"] == [change]


def test_a_moved_or_reformatted_file_is_the_same_data(model: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path, TOKENS)
    config = tokens_config(tmp_path, model, "full")
    save(config, start_of(config).progress)
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace(", ", " , "))
    assert start_of(config).progress.step == 3


WEIGHTS = "model.safetensors"
BASE = {
    "last byte": (WEIGHTS, lambda path: flip(path, -1)),
    "a byte in between": (WEIGHTS, lambda path: flip(path, path.stat().st_size // 2)),
    "configuration": ("config.json", lambda path: edit(path, lambda values: values.update(rms_norm_eps=1e-3))),
}


@pytest.mark.parametrize("change", BASE.values(), ids=BASE)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_base_weights_under_the_same_path(change: Any, method: str, model: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path, TOKENS)
    config = tokens_config(tmp_path, model, method)
    save(config, start_of(config).progress)
    name, apply = change
    apply(model / name)
    with pytest.raises(RequestError) as refused:
        start_of(config)
    (problem,) = refused.value.problems
    assert problem.where == "model.name_or_path" and f"{name}: " in problem.rule
    accepted = start_of(tokens_config(tmp_path, model, method, accept_changes=["base"])).progress.accepted
    assert len(accepted) == 1 and name in accepted[0]


def test_another_tokenizer_and_template_are_told_with_the_rows_that_they_change(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    config = chat_config(tmp_path / "run", model, {"name": "lora"}, tmp_path)
    save(config, start_of(config).progress)

    def reverse(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        names = sorted((name for name in vocabulary if name.isalpha()), key=vocabulary.get)
        vocabulary.update(zip(names, [vocabulary[name] for name in reversed(names)], strict=True))

    edit(model / "tokenizer.json", reverse)
    with pytest.raises(RequestError) as refused:
        start_of(config)
    assert [problem.where for problem in refused.value.problems] == ["data.train", "model.tokenizer"]
    shutil.copy(tiny_file(model), model / "chat_template.jinja")
    with pytest.raises(RequestError) as refused:
        start_of(config)
    assert {problem.where for problem in refused.value.problems} == {"data.train", "model.tokenizer", "chat template"}


def tiny_file(model: Path) -> Path:
    """A chat template that renders as the model's own, with a comment."""
    template = model / "chat_template.jinja"
    text = (
        template.read_text()
        if template.exists()
        else json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    )
    path = model.parent / "other.jinja"
    path.write_text("{# another file #}" + text)
    return path


def test_other_versions_and_missing_fingerprints_are_only_told() -> None:
    held = {"code": {"torch": "2.1", "git": "a"}, "data": {"data.train": "x"}}
    now = {"code": {"torch": "2.2", "git": "a"}, "data": {"data.train": "x"}}
    before = Progress(4, 1, "ddp", None, None, None, 0, fingerprints=held)
    progress, told = accept_changes(before, now, [])
    assert told == ["other versions than at step 4: torch: 2.1 → 2.2"] and progress.fingerprints == now
    _, told = accept_changes(Progress(4, 1, "ddp", None, None, None, 0), now, [])
    assert told == ["the checkpoint of step 4 has no fingerprints, so changed data would not be noticed"]


def test_only_rank_0_chooses_and_its_error_is_raised_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RequestError.of("data.train", "is another", "restore it")
    monkeypatch.setattr(comm, "from_main", lambda value: error)
    monkeypatch.setattr(comm.dist, "get_rank", lambda: 1)
    with pytest.raises(RequestError, match="is another"):
        comm.on_main(lambda: sys.exit("rank 1 does not look"))
