import subprocess

import pytest

from dist_ft.errors import MachineError, RequestError
from dist_ft.launch.composition.paths import SLURM_DIR
from dist_ft.launch.slurm import SlurmLauncher, Template
from tests.golden import check_golden
from tests.unit.launch.plans import SITE, plan_of

FULL = [
    "train.global_batch_size=64",
    "launch.nodes=2",
    "launch.workers_per_node=8",
    "launch.cpus_per_task=6",
    "launch.mem=64G",
    "launch.time='2-00:00:00'",
    "launch.partition=gpu",
    "launch.account=team",
    "launch.qos=high",
    "launch.constraint='a100&nvlink'",
    'launch.setup=["module load cuda","export NCCL_SOCKET_IFNAME=ib0"]',
    "launch.sbatch.mail-type=END",
    "launch.sbatch.comment='two words'",
    "launch.sbatch.exclusive=''",
]
SMALL = ["launch.nodes=2", "launch.workers_per_node=1", "launch.gpus_per_node=0"]


def launch(*words, output_dir="/runs/first"):
    launcher = SlurmLauncher(SITE)
    return launcher, plan_of(launcher, ["launch=slurm", *words], output_dir)


@pytest.mark.parametrize(("name", "words"), [("full", FULL), ("small", SMALL)])
def test_rendered_as_it_was(name, words, tmp_path):
    launcher, plan = launch(*words)
    text = launcher.render(plan).files["job.sbatch"]
    check_golden(f"slurm_{name}.job.sbatch", text)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "@{" not in text


@pytest.mark.parametrize("file", sorted(SLURM_DIR.glob("*.sbatch")), ids=lambda file: file.name)
def test_every_template_is_a_shell_script_with_known_places(file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n# ")
    known = {
        *("run_name", "nodes", "workers", "world_size", "directives", "cwd", "setup", "port", "threads"),
        *("failure_file", "launch"),
    }
    rendered = Template(text).substitute(dict.fromkeys(known, "x"))
    subprocess.run(["bash", "-n"], input=rendered, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["launch.sbatch.nodes='3'"], "is set by the plan"),
        (["launch.sbatch.Mail='3'"], "not the long name"),
        (["launch.partition='a\nb'"], "contains line breaks"),
        (["launch.sbatch.comment='a\nb'"], "contains line breaks"),
    ],
)
def test_options_that_are_refused(words, rule):
    with pytest.raises(RequestError, match=rule):
        launch("launch.workers_per_node=1", *words)


def test_hostile_names_stay_words(tmp_path):
    launcher, plan = launch(
        "launch.workers_per_node=1", "launch.account='$(touch x)'", output_dir="'/a b/%j/$(touch y)'"
    )
    text = launcher.render(plan).files["job.sbatch"]
    assert "#SBATCH --account='$(touch x)'" in text
    assert "#SBATCH --output='/a b/%%j/$(touch y)/logs/job-%j.log'" in text
    assert "-m dist_ft.worker '/a b/%j/$(touch y)/run.yaml' &" in text


def job(tmp_path, launcher, plan, srun):
    """Run the batch script with stubs for srun and scontrol; return its exit code and the arguments of srun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {
        "srun": f'printf "%s\\n" "$@" "$MASTER_ADDR" >{tmp_path}/said\n{srun}',
        "scontrol": "echo n1; echo n2",
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    plan.run_dir.mkdir(parents=True)
    text = launcher.render(plan).files["job.sbatch"].replace("cd '/home/ada/my work'", f"cd {tmp_path}")
    env = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]"}
    code = subprocess.run(["bash", "-c", text], env=env, check=False).returncode
    return code, (tmp_path / "said").read_text().splitlines()


def test_a_job_starts_a_task_a_worker_and_ends_with_the_failed_workers_code(tmp_path):
    launcher, plan = launch(*SMALL, output_dir=tmp_path / "run")
    failure = f'echo \'{{"rank": 1, "exit_code": 3}}\' >{tmp_path}/run/failure.json; exit 137'
    code, said = job(tmp_path, launcher, plan, failure)
    assert code == 3
    assert said[:3] == ["--kill-on-bad-exit=1", "--ntasks=2", "--ntasks-per-node=1"]
    assert said[-3:] == ["dist_ft.worker", f"{tmp_path}/run/run.yaml", "n1"]


@pytest.mark.parametrize("status", [0, 75, 137])
def test_a_job_without_a_report_ends_with_sruns_code(tmp_path, status):
    launcher, plan = launch(*SMALL, output_dir=tmp_path / "run")
    assert job(tmp_path, launcher, plan, f"exit {status}")[0] == status


def test_refusals_are_slurms_own_words(tmp_path, monkeypatch):
    launcher, plan = launch(*SMALL, output_dir=tmp_path / "run")
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
