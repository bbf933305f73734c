"""Files that other services read: the workflow calls .ci/run, and hooks and citation agree with the project."""

from pathlib import Path
from typing import Any

import yaml

import dist_ft

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_the_script_that_runs_everywhere_else() -> None:
    job = read(".github/workflows/ci.yml")["jobs"]["ci"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["container"].startswith("debian:")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_hooks_call_programs_of_the_environment() -> None:
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    development = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks:
        program, word = hook["entry"].split()[:2]
        if program == "make":
            assert f"\n{word}:" in targets
        else:
            assert f'"{program.removeprefix(".venv/bin/")}>=' in development


def test_issue_forms_ask_for_what_a_run_records() -> None:
    for form in ("bug", "feature"):
        content = read(f".github/ISSUE_TEMPLATE/{form}.yml")
        names = [field["id"] for field in content["body"]]
        assert {"name", "description", "body"} <= set(content) and len(set(names)) == len(names)


def test_the_citation_names_version_and_license_of_the_package() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == dist_ft.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
