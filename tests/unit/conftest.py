"""Folders of finished runs, made once for the tests of all commands that read them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of prepared data that finished runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_cache: Path) -> Path:
    """A run of LoRA. Who changes a file puts it back."""
    from tests.runs import finish_run

    return finish_run(tmp_path_factory.mktemp("lora"), tiny_llama, {"name": "lora", "r": 4}, run_cache)


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_cache: Path) -> Path:
    """A run of full fine-tuning. Who changes a file puts it back."""
    from tests.runs import finish_run

    return finish_run(tmp_path_factory.mktemp("full"), tiny_llama, {"name": "full"}, run_cache)
