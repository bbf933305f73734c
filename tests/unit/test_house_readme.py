"""Tests of the documentation: commands can be planned, make targets exist, and tables match the code."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_ft.checks.request import check
from dist_ft.config.plan import Plan
from dist_ft.config.run import RunConfig
from dist_ft.data.read.formats import detect
from dist_ft.data.read.rows import read_rows
from dist_ft.launch import cli
from dist_ft.launch.composition.compose import compose, list_groups
from dist_ft.launch.composition.keys import members, names
from dist_ft.launch.guide.listing import help_lines, list_lines
from dist_ft.launch.guide.usage import build_parser
from dist_ft.launch.machine.environ import Site
from dist_ft.launch.planning import plan_run
from dist_ft.launch.search.run import check_values
from dist_ft.launch.search.space import read_search
from dist_ft.launch.stages import read_stages, run_stages
from dist_ft.process.options import CancelOptions, LogsOptions, StatusOptions
from dist_ft.process.options import read_words as read_options

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROW = '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}\n'
VIEW_WORDS = {"rows", "split", "width"}
SITE = Site(python="python", cwd="/work", cores=2)


def commands(path: Path) -> list[str]:
    """Return the lines of the `sh` blocks of a document, with continuation lines joined and without comments."""
    blocks = "\n".join(BLOCK.findall(path.read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines() if line.strip() and not line.lstrip().startswith("#")]


YAML_BLOCKS = [block for path in DOCUMENTS for block in YAML_BLOCK.findall(path.read_text(encoding="utf-8"))]
TYPED = [(path.name, line) for path in DOCUMENTS for line in commands(path)]
YAML_COMMANDS = [
    (str(path.relative_to(ROOT)), match)
    for path in sorted((ROOT / "conf").rglob("*.yaml"))
    for match in re.findall(r"`(dist-ft [^`]+)`", path.read_text(encoding="utf-8").splitlines()[0])
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder with the files that the documents refer to."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "validation.jsonl", "my_rows.jsonl"):
        (tmp_path / name).write_text(ROW * 200)
    for name in ("wikitext.jsonl", "corpus.jsonl"):
        (tmp_path / name).write_text('{"text": "Some words."}\n' * 200)
    for text in YAML_BLOCKS:
        if "stages:" in text:
            (tmp_path / "stages.yaml").write_text(text)
        elif text.startswith("run_name: first\n"):
            (tmp_path / "first.yaml").write_text(text)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("Once upon a time.\n" * 50)
    (tmp_path / "hosts.txt").write_text("one slots=2\ntwo slots=2\n")
    return tmp_path


def plan_of(words: list[str]) -> Plan:
    """Plan and render, like `dist-ft plan`."""
    plan, launcher = plan_run(words, None, SITE)
    assert launcher.render(plan).start
    return plan


def try_command(line: str) -> None:
    """Run a `dist-ft` line as far as possible without starting a worker or loading a model."""
    options = build_parser(cli.COMMANDS).parse_args(shlex.split(line)[1:])
    if options.command in ("train", "submit", "plan", "data"):
        assert options.config_dir is None
        own = {"data": VIEW_WORDS, "plan": {"show"}}.get(options.command, ())
        words = [word for word in options.words if word.partition("=")[0] not in own]
        plan = plan_of(words)
        assert (options.command == "submit") == (plan.config.launch.name == "slurm") or options.command == "plan"
    elif options.command == "sweep":
        check_values(
            read_search(options.words), lambda words: compose(words).config, lambda words: plan_of(list(words)).config
        )
    elif options.command == "init":
        assert cli.main(["init", *options.words]) == 0
    elif options.command == "list":
        assert list(list_lines(options.group))
    elif options.command == "help":
        assert list(help_lines(options.key))
    elif options.command == "stages":
        trained = []
        stages = read_stages(Path(options.file), options.words)
        run_stages(stages, lambda words: plan_of(list(words)).config, lambda words: trained.append(words) or 4, print)
        assert trained
    elif options.command in ("status", "logs", "cancel"):
        kind = {"status": StatusOptions, "logs": LogsOptions, "cancel": CancelOptions}[options.command]
        read_options(kind, options.words)
    elif options.command in ("eval", "generate", "export", "report"):
        assert any(word.startswith("run=") for word in options.words), line
        assert all("=" in word for word in options.words), line


def test_documents_have_commands() -> None:
    assert {"dist-ft train", "dist-ft plan", "dist-ft submit"} <= {" ".join(line.split()[:2]) for _, line in TYPED}
    assert [line for name, line in TYPED if name == "README.md"][:2] == ["make train", "make test"]


@pytest.mark.parametrize(("document", "line"), TYPED, ids=[f"{n}: {line[:60]}" for n, line in TYPED])
def test_command_of_a_document(document: str, line: str, folder: Path) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        targets = [word for word in words if "=" not in word]
        run = subprocess.run(["make", "-n", "-C", str(ROOT), *targets], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    else:
        assert program == "dist-ft", f"{document}: no test can run {line!r}"
        try_command(line)


@pytest.mark.parametrize(("file", "line"), YAML_COMMANDS, ids=[f"{n}: {line[:60]}" for n, line in YAML_COMMANDS])
def test_command_of_a_yaml_file(file: str, line: str, folder: Path) -> None:
    try_command(line)


def test_the_documents_name_every_command() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `dist-ft ([a-z]+)` \|", text, re.MULTILINE))
    assert told == set(cli.COMMANDS)


def group_rows() -> list[str]:
    """Return the rows of the table of groups as defined by the code: choices by file, keys by schema."""
    rows = []
    for group, field in RunConfig.model_fields.items():
        records = members(field.annotation)
        if not records:
            continue
        shared = [key for key in records[0].model_fields if all(key in r.model_fields for r in records)]
        keys = [f"`{key}`" for key in shared if key != "name"]
        alike: dict[str, list[str]] = {}  # keys → choices with exactly these keys
        for record in records:
            own = " ".join(f"`{key}`" for key in record.model_fields if key not in shared and key != "name")
            if own:
                alike.setdefault(own, []).extend(names(record))
        keys += [f"{' and '.join(choices)}: {own}" for own, choices in alike.items()]
        text = "; ".join([" ".join(k for k in keys if k.startswith("`")), *(k for k in keys if not k.startswith("`"))])
        choices = list_groups().get(group, [])
        rows.append(f"| `{group}` | {' '.join(f'`{c}`' for c in choices)} | {text.removeprefix('; ')} |")
    rows.append(f"| `experiment` | {' '.join(f'`{c}`' for c in list_groups()['experiment'])} | any of the above |")
    return rows


def test_the_documents_tell_every_group_and_key() -> None:
    text = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    told = [line for line in text.splitlines() if line.startswith("| `")]
    assert told == group_rows(), "the table should be:\n" + "\n".join(group_rows())


def test_the_mixture_of_the_documents_is_one(folder: Path) -> None:
    (block,) = [block for block in YAML_BLOCKS if "mixture:" in block]
    (folder / "data").mkdir()
    (folder / "data" / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(block)["data"]))
    composed = compose(["data=mine"], config_dir=folder)
    assert check(composed.config, composed.origins) == []
    assert list(composed.config.data.mixture or ()) == ["dolly", "gsm8k"]


def test_the_readme_fits_on_three_screens_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert set(re.findall(r"\]\((docs/[^)]+\.md)\)", text)) == {f"docs/{path.name}" for path in DOCUMENTS[2:]}


def test_the_example_rows_have_the_formats_of_the_readme_and_fill_a_global_batch() -> None:
    rows = [row for _, row in read_rows(str(ROOT / "examples" / "rows.jsonl"))]
    formats = {detect(row, task="instruction") for row in rows}
    assert formats == {"messages", "prompt_completion", "alpaca"}
    on_any = [plan_run([], None, replace(SITE, devices=tuple(range(gpus))))[0] for gpus in range(1, 9)]
    assert len(rows) >= max(plan.config.train.global_batch_size for plan in on_any)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"
