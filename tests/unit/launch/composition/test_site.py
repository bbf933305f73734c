"""Defaults of a site: what the user sets wins, and every key has an origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import COMMAND_LINE, compose

SITE = """
partition: gpu
account: physics
workers_per_node: 4
setup: [module load cuda]
sbatch: {mail-type: FAIL, exclusive: ''}
"""


def test_the_users_keys_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(SITE)
    composed = compose(
        ["launch=slurm", "launch.site=site.yaml", "launch.account=chemistry", "launch.sbatch.mail-type=END"]
    )
    launch, file = composed.config.launch, str(tmp_path / "site.yaml")
    assert launch.name == "slurm"
    assert (launch.partition, launch.account, launch.workers_per_node) == ("gpu", "chemistry", 4)
    assert launch.setup == ["module load cuda"]
    assert launch.sbatch == {"mail-type": "END", "exclusive": ""}
    assert launch.site == file
    assert composed.origins["launch.partition"] == file
    assert composed.origins["launch.account"] == COMMAND_LINE


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("gpu", "does not contain keys with values"),
        ("partitions: gpu", "did you mean launch.partition?"),
        ("name: local", "cannot be a default of a site"),
        ("time: 0", "launch.time (SITE): 0 is invalid"),
    ],
)
def test_files_that_are_refused(text: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError) as error:
        compose(["launch=slurm", "launch.workers_per_node=1", f"launch.site={file}"])
    assert told.replace("SITE", str(file)) in str(error.value)
