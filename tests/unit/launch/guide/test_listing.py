"""Tests of `dist-ft list` and `dist-ft help`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_ft.errors import RequestError
from dist_ft.launch import cli
from dist_ft.launch.composition.compose import list_groups
from dist_ft.launch.composition.keys import every_key
from dist_ft.launch.composition.paths import CONF_DIR
from dist_ft.launch.guide.listing import help_lines, list_lines


def test_every_choice_is_listed_with_the_sentence_of_its_file() -> None:
    lines = list(list_lines(None))
    for group, choices in list_groups().items():
        at = lines.index(group)
        for choice in choices:
            line = next(line for line in lines[at:] if line.startswith(f"  {choice} "))
            first = (CONF_DIR / group / f"{choice}.yaml").read_text().splitlines()[0]
            assert first.removeprefix("# ").startswith(line.split(maxsplit=1)[1])
            assert "`dist-ft" not in line
    assert list(list_lines("engine"))[1] == "  ddp                       PyTorch DDP: every rank holds the whole model."


def test_own_groups_are_listed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# My model.\nname_or_path: a/b\n")
    assert "  mine                      My model." in list(list_lines("model", str(tmp_path)))


def test_a_group_that_does_not_exist() -> None:
    with pytest.raises(RequestError, match="method"):
        list(list_lines("metod"))


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("method.r", ["type integer ≥ 1", "default 16", "only with method=lora, method=qlora"]),
        ("train.seed", ["type integer ≥ 0", "default 0"]),
        ("model.dtype", ["type auto or float32 or bfloat16", "default auto"]),
        ("launch.hostfile", ["type text", "default required", "only with launch=deepspeed"]),
        ("optim.betas", ["type list of number ≥ 0 and ≤ 1", "default [0.9, 0.999]"]),
        ("train.save_minutes", ["type number > 0 or auto or null", "default auto"]),
    ],
)
def test_a_key_is_explained(key: str, lines: list[str]) -> None:
    first, *rest = help_lines(key)
    assert first == key
    assert [" ".join(line.split()) for line in rest][: len(lines)] == lines


def test_keys_have_a_type_and_the_default_of_their_file() -> None:
    defaults = yaml.safe_load((CONF_DIR / "train.yaml").read_text())
    for key in [key for key in every_key() if not key.endswith(".name")][::12]:
        found = {line.split()[0]: " ".join(line.split()[1:]) for line in list(help_lines(key))[1:3]}
        assert found["type"], key
        section, _, name = key.partition(".")
        if name in defaults.get(section, {}):
            shown = defaults[section][name]
            assert found["default"] == ("null" if shown is None else str(shown).lower()), key


def test_a_section_lists_its_keys_and_a_command_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert next(help_lines("engine")) == "engine=ddp|fsdp|zero1|zero2|zero3"
    assert "engine.offload" in list(help_lines("engine"))
    assert cli.main(["help", "plan"]) == 0
    assert capsys.readouterr().out.startswith("usage: dist-ft plan")


@pytest.mark.parametrize(("key", "way_out"), [("lora_r", "method.r"), ("trian", "train"), ("bf16", "model.dtype")])
def test_a_key_of_others_names_ours(key: str, way_out: str) -> None:
    with pytest.raises(RequestError, match=way_out):
        list(help_lines(key))
