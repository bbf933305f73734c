"""The Dockerfile, which is not built here: what it copies, installs and starts exists, and the changes are listed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import dist_ft

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_only_instructions_of_docker_are_used(instructions) -> None:
    assert {name for name, _ in instructions} <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}
    assert instructions[0][0] == "ARG"
    stages = [rest for name, rest in instructions if name == "FROM"]
    assert len(stages) == 2
    built = [re.search(r" AS (\w+)$", stage) for stage in stages]
    assert [match[1] for match in built if match] == ["build"]


def test_the_python_of_the_image_is_one_that_the_package_takes(instructions, project) -> None:
    (version,) = [rest.removeprefix("PYTHON=") for name, rest in instructions if rest.startswith("PYTHON=")]
    assert SpecifierSet(project["requires-python"]).contains(version)


def test_what_is_copied_exists_and_is_not_ignored(instructions) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    for name, rest in instructions:
        source, target = rest.split()[-2:] if name == "COPY" else ("", "")
        if name == "COPY" and "--from=" in rest:
            assert "--from=build" in rest
            assert any(f"--outdir {source.rstrip('/')}" in other for _, other in instructions)
        elif name == "COPY":
            assert (ROOT / source).exists()
            assert source not in ignored
            assert target
    # what a wheel is made of: the folders behind the links in dist_ft/, and what pyproject.toml names
    needed = {"dist_ft", "conf", "launch", "slurm", "pyproject.toml", "README.md", "LICENSE"}
    assert not needed & set(ignored)
    assert all((ROOT / name).exists() for name in needed)


def test_what_is_started_and_installed_is_the_package(instructions, project) -> None:
    (entry,) = [json.loads(rest) for name, rest in instructions if name == "ENTRYPOINT"]
    assert entry == [*project["scripts"]]
    (install,) = [rest for name, rest in instructions if name == "RUN" and "constraints.txt" in rest]
    assert "-c /wheels/constraints.txt" in install
    assert "/wheels/*.whl" in install
    comment = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("FROM")[0]
    (extras,) = re.findall(r"EXTRAS=([\w,-]+)", comment)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_programs_that_the_package_calls_are_in_the_image(instructions) -> None:
    packages = " ".join(rest for name, rest in instructions if name == "RUN" and "apt-get" in rest).split()
    assert {"git", "openssh-client", "pdsh", "g++"} <= set(packages)


def test_the_changes_of_this_version_are_listed() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert dist_ft.__version__ in headings
