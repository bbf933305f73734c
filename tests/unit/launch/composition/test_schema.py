"""The JSON Schema accepts what is read, and refuses what is refused; jsonschema judges independently."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import compose, list_groups
from dist_ft.launch.composition.paths import CONF_DIR
from dist_ft.launch.composition.schema import file_schema


@pytest.fixture
def check():
    schema = file_schema(list_groups())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("file", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_it_accepts_the_keys_of_every_experiment(file: Path, check) -> None:
    content = yaml.safe_load(file.read_text().replace("e-", ".0e-"))
    chosen = {
        key.removeprefix("override /"): name for part in content.pop("defaults", []) for key, name in part.items()
    }
    for group, name in chosen.items():
        content[group] = {"name": name, **content[group]} if group in content else name
    assert list(check.iter_errors(content)) == []


@pytest.mark.parametrize(
    "text",
    [
        "{model: smollm2, data: support_desk, track: off}",
        "{model: {name: qwen, dtype: float32}, data: {name: support_desk, max_rows: 8}}",
        "{method: {r: 8}, engine: {name: zero3, offload: optimizer}}",
        "{method: {name: full, r: 8}}",
        "{engine: {name: ddp, offload: optimizer}}",
        "{task: {name: causal_lm, chat_template: x}}",
        "{model: {name_or_path: 3}}",
        "{train: {max_steps: 0}}",
        "{optim: {betas: [0.9]}}",
        "{runname: x}",
        "{method: [lora]}",
        "{moe: frozen}",
    ],
)
def test_it_agrees_with_what_is_read(text: str, check, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("given.yaml").write_text(text)
    try:
        compose(["given.yaml"])
        is_read = True
    except RequestError:
        is_read = False
    content = yaml.safe_load(text)
    if content.get("track") is False:  # YAML 1.1
        content["track"] = "off"
    assert (not list(check.iter_errors(content))) == is_read
