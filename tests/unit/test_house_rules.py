"""Tests of project conventions that no linter checks: environment, file length, names, tests, packaging, YAML files."""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest on Python 3.10

ROOT = Path(__file__).resolve().parents[2]
# spawn.py launches the workers of the tests
ENVIRONMENT_READERS = {"launch/machine/environ.py", "dist_ft/process/place.py", "dist_ft/testing/spawn.py"}
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
MOST_MODULES, MOST_AT_THE_ROOT = 14, 10


def sources() -> list[Path]:
    """Return every module of the package once; symbolic links in dist_ft/ point to the top-level folders."""
    return sorted([*ROOT.glob("launch/**/*.py"), *(p for p in ROOT.glob("dist_ft/**/*.py") if not _linked(p))])


def _linked(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents)


def environment_reads(tree: ast.AST) -> Iterator[int]:
    """Yield the line numbers that use os.environ or os.getenv, under any name of the os module."""
    names = {"os"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name == "os" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in {"environ", "getenv", "putenv"})
    for node in ast.walk(tree):
        touches = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv", "environb"}
        if touches and isinstance(node.value, ast.Name) and node.value.id in names:
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import os\nos.environ['A']", [2]),
        ("import os as o\no.getenv('A')", [2]),
        ("from os import environ", [1]),
        ("import os\nos.replace('a', 'b')", []),
        ("from .comm import environ", []),
    ],
)
def test_environment_reads_are_found(code: str, lines: list[int]) -> None:
    assert list(environment_reads(ast.parse(code))) == lines


def test_environment_is_read_in_two_places_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        if str(path.relative_to(ROOT)) not in ENVIRONMENT_READERS
        for line in environment_reads(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"read the environment in launch/machine/environ.py or dist_ft/process/place.py: {found}"


def test_files_and_functions_fit_in_the_head() -> None:
    long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if (lines := text.count("\n")) > LONGEST_FILE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert not long


def files_of_tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


def test_files_of_tests_fit_in_the_head() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files_of_tests()}
    assert not {name: count for name, count in lines.items() if count > LONGEST_FILE}


def lines_naming_test_modules(tree: ast.AST) -> Iterator[int]:
    """Yield the line numbers that import a module of tests or a conftest.py, or name one for another process."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            names = [name for name in names if node.level or name.startswith("tests.")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"\btests(?:\.\w+)+(?=:)", node.value)
        parts = {part for name in names for part in name.split(".")}
        if any(part == "conftest" or part.startswith("test_") for part in parts):
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("from tests.unit.export.test_write import Case", [1]),
        ("import os\nimport tests.unit.export.test_write", [2]),
        ("from tests.unit.export import test_write", [1]),
        ("from .test_write import Case", [1]),
        ("from . import test_write", [1]),
        ("from tests.dist.conftest import ROWS", [1]),
        ("def f():\n    spawn(2, 'tests.dist.test_privacy:run', [])", [2]),
        ("from tests.exports import Case\nimport pytest\nspawn(2, 'tests.dist.cases:run_cases', [])", []),
        ("'as tests/unit/test_loop.py shows'", []),
        ("from tests.samples import given\nfrom torch.testing import test_something", []),
    ],
)
def test_names_of_test_modules_are_found(code: str, lines: list[int]) -> None:
    assert list(lines_naming_test_modules(ast.parse(code))) == lines


def test_no_test_imports_another() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in [*files_of_tests(), *(ROOT / "benchmarks").rglob("*.py")]
        if path != Path(__file__).resolve()
        for line in lines_naming_test_modules(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"move what tests share to dist_ft/testing or a module of tests that holds no test: {found}"


def test_unit_tests_mirror_the_rooms() -> None:
    """A test bears the name of the module that it tests, or that name and an aspect: test_write_moe of write.py."""
    unit, strangers = ROOT / "tests" / "unit", []
    for path in unit.rglob("test_*.py"):
        room = path.parent.relative_to(unit)
        modules = {entry.stem for entry in (ROOT / "dist_ft" / room).glob("*") if entry.suffix in ("", ".py")}
        modules |= {"house"} if path.parent == unit else set()
        name = path.stem.removeprefix("test_")
        if not any(name == module or name.startswith(f"{module}_") for module in modules):
            strangers.append(str(path.relative_to(ROOT)))
    assert not strangers, f"no module of dist_ft has the name of {strangers}"


def test_folders_stay_small() -> None:
    """A folder has at most 14 modules besides `__init__`, and the root of the package at most 10 files."""
    counts = Counter(path.parent for path in sources() if path.stem != "__init__")
    large = {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MOST_MODULES}
    assert not large, f"divide these folders into subfolders: {large}"
    assert len(list((ROOT / "dist_ft").glob("*.py"))) <= MOST_AT_THE_ROOT


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "manager", "managers", "handler", "handlers"}
    assert not [path for path in sources() if path.stem in drawers or path.parent.name in drawers]


def test_links_lead_to_the_top_level_folders() -> None:
    for name in ("conf", "launch", "slurm"):
        link = ROOT / "dist_ft" / name
        assert link.is_symlink(), f"dist_ft/{name} is a symbolic link to ../{name}"
        assert link.resolve() == ROOT / name


def test_every_marker_used_is_declared_and_every_extra_installs_something() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["project"]["optional-dependencies"]) == {
        *("flash", "sweep", "privacy", "lm-eval", "augment", "tensorboard", "mlflow", "trackio", "dev")
    }
    assert all(project["project"]["optional-dependencies"].values())


def test_what_methods_engines_and_launchers_need_is_installed_with_the_package() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    on_linux = {"platform_system": "Linux"}
    needed = [Requirement(line) for line in project["dependencies"]]
    names = {r.name for r in needed if r.marker is None or r.marker.evaluate(on_linux)}
    assert {"torch", "peft", "bitsandbytes", "deepspeed", "nvidia-ml-py"} <= names


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line.split("#")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pins = {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line.strip())}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    for requirement in wanted:
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version, prereleases=True), f"{pin} is outside {requirement}"


def test_every_yaml_opens_with_a_sentence_and_its_command() -> None:
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        first = text.splitlines()[0]
        assert re.match(r"# .*`dist-ft (train|submit|plan|eval|generate)[^`]*`", first), f"{path}: {first}"
        assert not re.search(r"\b_target_\b", text), f"{path}: a configuration must not name code (_target_)"
        yaml.safe_load(text)


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """By default, pytest skips folders named dist."""
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert "dist" in folders
    passed_over = {f for f in folders for p in pytestconfig.getini("norecursedirs") if fnmatch.fnmatch(f, p)}
    assert not passed_over
