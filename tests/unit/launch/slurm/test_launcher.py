"""What is refused before a job is submitted, and what SLURM refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config.plan import FAILURE_FILE, STOP_FILE
from dist_ft.errors import MachineError, RequestError
from dist_ft.launch.show import adapted_lines
from dist_ft.launch.slurm.launcher import PLACES, SlurmLauncher
from dist_ft.launch.slurm.script import TEMPLATE, Template
from tests.unit.launch.plans import SITE, plan_of

OWN = """#!/bin/bash
@{directives}
@{setup}
mpirun -n @{world_size} @{command}
"""


def launch(*words: str, output_dir: str | Path = "/runs/first"):
    launcher = SlurmLauncher(SITE)
    return launcher, plan_of(launcher, ["launch=slurm", "launch.workers_per_node=2", *words], output_dir)


def test_the_template_names_the_files_of_a_run_as_they_are() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    assert {"directives", "step", "requeue"} <= Template(text).names <= PLACES
    assert f'"$run/{FAILURE_FILE}" "$run/{STOP_FILE}"' in text


def test_an_own_template_is_rendered(tmp_path: Path) -> None:
    (tmp_path / "site.sbatch").write_text(OWN)
    launcher, plan = launch(f"launch.template={tmp_path}/site.sbatch", "launch.setup=['module load a']")
    text = launcher.render(plan).files["job.sbatch"]
    assert "\n#SBATCH --ntasks-per-node=2\n" in text
    assert text.endswith("module load a\n\nmpirun -n 2 /opt/env/bin/python -u -m dist_ft.worker /runs/first/run.yaml\n")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "cannot be read"),
        (OWN.replace("@{directives}", ""), "does not contain @{directives}"),
        (OWN.replace("@{command}", "python train.py"), "so it starts no worker"),
        (OWN.replace("@{setup}", "@{modules}"), "@{modules} is unknown"),
        (OWN.replace("#!/bin/bash", ""), "has no first line"),
    ],
)
def test_templates_that_cannot_train_are_refused(text: str | None, rule: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "site.sbatch").write_text(text)
    with pytest.raises(RequestError) as error:
        launch(f"launch.template={tmp_path}/site.sbatch")
    assert [rule in problem.rule for problem in error.value.problems] == [True]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["launch.container=a.sif"], "is an image of Apptainer"),
        (["launch.container=a.sqsh", "launch.container_runtime=apptainer"], "is an image of Enroot"),
        (["launch.container=a", "launch.container_mounts=[data]"], "cannot be mounted: it is not an absolute path"),
        (["launch.container=a", "launch.container_mounts=['/a,b']"], "contains a comma"),
        (["launch.container='a\nb'"], "contains line breaks"),
    ],
)
def test_containers_that_are_refused(words: list[str], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        launch(*words)


def test_refusals_are_slurms_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, plan = launch(output_dir=tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="sbatch is not installed"):
        launcher.submit(plan)
    stub = tmp_path / "sbatch"
    stub.write_text(
        '#!/bin/sh\nif [ "$1" = --test-only ]; then echo "allocation failure: no such partition" >&2; exit 1; fi\n'
    )
    stub.chmod(0o755)
    with pytest.raises(MachineError, match="allocation failure: no such partition"):
        launcher.submit(plan)
    stub.write_text('#!/bin/sh\n[ "$1" = --test-only ] || echo "17;cluster"\n')
    submitted = launcher.submit(plan)
    assert submitted.identity == "17"
    assert submitted.log == tmp_path / "run" / "logs" / "job-17.log"


@pytest.mark.parametrize(
    ("kinds", "words", "gpus"),
    [
        ("gpu:a100:8(S:0-1)\n(null)", [], 2),
        ("(null)", [], None),
        ("(null)", ["launch.gpus_per_node=1"], 1),
        ("", [], 2),  # an unknown partition, which sbatch rejects
        (None, [], 2),  # no SLURM on this machine
    ],
)
def test_gpus_are_requested_where_there_are_some(
    kinds: str | None, words: list[str], gpus: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if kinds is not None:
        (tmp_path / "kinds").write_text(kinds)
        (tmp_path / "sinfo").write_text(f'#!/bin/sh\n[ "$3" = --partition=p ] && cat {tmp_path}/kinds\n')
        (tmp_path / "sinfo").chmod(0o755)
    launcher, plan = launch("launch.partition=p", *words)
    (tmp_path / "sinfo").unlink(missing_ok=True)
    rendered = launcher.render(plan)
    found = [line for line in rendered.files["job.sbatch"].splitlines() if "gpus-per-node" in line]
    assert found == ([f"#SBATCH --gpus-per-node={gpus}"] if gpus else [])
    told = [line for line in adapted_lines(plan) if "gpus" in line]
    reason = f"{gpus} (one per worker)" if gpus else "0 (no node has GPUs)"
    assert told == ([] if words else [f"launch.gpus_per_node → {reason}"])
    assert SlurmLauncher(SITE).render(plan) == rendered  # the plan holds all that is rendered
