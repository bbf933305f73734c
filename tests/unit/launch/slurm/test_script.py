import json
import shlex
import socket
import subprocess

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.slurm.launcher import SlurmLauncher
from dist_ft.launch.slurm.script import time_limit_s
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
AGENT = ["launch.nodes=2", "launch.workers_per_node=4", "launch.tasks_per_node=1", "launch.requeue=false"]
PYXIS = ["launch.nodes=2", "launch.workers_per_node=1", "launch.container='nvcr.io#nvidia/pytorch:25.10-py3'"]
PYXIS += ["launch.container_mounts=[/data,'/my models:/models:ro']"]
APPTAINER = [
    "launch.workers_per_node=1",
    "launch.container='/images/my image.sif'",
    "launch.container_runtime=apptainer",
]
APPTAINER += ["launch.container_python=/opt/python", "launch.container_mounts=[/data]"]
SMALL = ["launch.nodes=2", "launch.workers_per_node=1", "launch.gpus_per_node=0"]


LOST = "Task launch for StepId=17.1 failed on node n2: Communication connection failure"


def launch(*words, output_dir="/runs/first"):
    launcher = SlurmLauncher(SITE)
    return launcher, plan_of(launcher, ["launch=slurm", *words], output_dir)


@pytest.mark.parametrize(
    ("name", "words"),
    [("full", FULL), ("small", SMALL), ("agent", AGENT), ("pyxis", PYXIS), ("apptainer", APPTAINER)],
)
def test_rendered_as_it_was(name, words, tmp_path):
    launcher, plan = launch(*words)
    text = launcher.render(plan).files["job.sbatch"]
    check_golden(f"slurm_{name}.job.sbatch", text)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "@{" not in text


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["launch.sbatch.nodes='3'"], "is set by the plan"),
        (["launch.sbatch.requeue=''"], "is set by the plan"),
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


def job(tmp_path, plan_and_launcher, srun, *, state="RUNNING", probe="", restart=None):
    """Run the batch script with stubs for the programs of SLURM.

    Returns:
        Its exit code, the words of the step's srun, and whether the job was requeued.
    """
    launcher, plan = plan_and_launcher
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in {
        "srun": f'[[ $1 == --overlap ]] && {{ echo "srun: error: {probe}" >&2; exit {int(bool(probe))}; }}\n'
        f'printf "%s\\n" "$@" "$MASTER_ADDR" "$MASTER_PORT" >{tmp_path}/said\n{srun}',
        "scontrol": f'case $1 in hostnames) ;; requeue) echo "$2" >{tmp_path}/requeued ;; show)\n'
        f'[[ $2 == job ]] && echo "   JobState={state} Reason=None" || echo localhost ;; esac',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    text = launcher.render(plan).files["job.sbatch"].replace("cd '/home/ada/my work'", f"cd {tmp_path}")
    env = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "10017"}
    env |= {} if restart is None else {"SLURM_RESTART_COUNT": str(restart)}
    run = subprocess.run(["bash", "-c", text], env=env, check=False, stdout=subprocess.PIPE, text=True)
    said = (tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else run.stdout.splitlines()
    return run.returncode, said, (tmp_path / "requeued").exists()


def test_a_job_starts_a_task_a_worker_and_ends_with_the_failed_workers_code(tmp_path):
    there = launch(*SMALL, output_dir=tmp_path / "run")
    failure = f'echo \'{{"rank": 1, "exit_code": 3}}\' >{tmp_path}/run/failure.json; exit 137'
    code, said, requeued = job(tmp_path, there, failure)
    assert (code, requeued) == (3, False)
    assert said[:3] == ["--kill-on-bad-exit=1", "--ntasks=2", "--ntasks-per-node=1"]
    assert said[-4:] == ["dist_ft.worker", f"{tmp_path}/run/run.yaml", "localhost", "20017"]


@pytest.mark.parametrize("status", [0, 75, 137])
def test_a_job_without_a_report_ends_with_sruns_code(tmp_path, status):
    assert job(tmp_path, launch(*SMALL, output_dir=tmp_path / "run"), f"exit {status}")[0] == status


@pytest.mark.parametrize(
    ("status", "cause", "state", "probe", "requeued"),
    [
        (75, "SIGTERM", "RUNNING", "", True),  # preempted
        (75, "SIGUSR1", "RUNNING", "", True),
        (75, "time limit of the job", "RUNNING", "", True),
        (75, "SIGTERM", "TIMEOUT", "", True),
        (75, None, "RUNNING", "", True),  # before the worker could write a report
        (75, "SIGTERM", "CANCELLED", "", False),
        (75, "dist-ft cancel", "RUNNING", "", False),
        (4, None, "RUNNING", "", False),
        (4, None, "RUNNING", LOST, True),  # a node is down
        (4, None, "RUNNING", "Unable to create step for job 17: Memory", False),
        (137, None, "RUNNING", LOST, True),
        (4, None, "CANCELLED", LOST, False),
        (3, None, "RUNNING", LOST, False),
        (0, None, "RUNNING", LOST, False),
    ],
)
def test_what_is_requeued(tmp_path, status, cause, state, probe, requeued):
    record = json.dumps({"rank": 0, "exit_code": status, "time": 1.5, "report": 'a "b" c', "cause": cause})
    tell = f"echo {shlex.quote(record)} >{tmp_path}/run/failure.json\n" if cause else ""
    there = launch(*SMALL, output_dir=tmp_path / "run")
    found = job(tmp_path, there, f"{tell}exit {status}", state=state, probe=probe)
    assert (found[0], found[2]) == (status, requeued)


@pytest.mark.parametrize("words", [["launch.requeue=false"], ["train.resume=never"]])
def test_a_job_that_cannot_go_on_is_not_requeued(tmp_path, words):
    there = launch(*SMALL, *words, output_dir=tmp_path / "run")
    text = there[0].render(there[1]).files["job.sbatch"]
    assert "#SBATCH --no-requeue\n" in text and "#SBATCH --requeue" not in text and "--signal" not in text
    assert job(tmp_path, there, "exit 75")[::2] == (75, False)
    with pytest.raises(RequestError, match="would not go on"):
        launch(*SMALL, "launch.requeue=true", "train.resume=never")


def test_restarts_without_a_new_checkpoint_end_the_job(tmp_path):
    """Three in a row end it; a new checkpoint starts the count again."""
    there = launch(*SMALL, output_dir=tmp_path / "run")
    codes = []
    for restart in range(7):
        if restart == 2:
            for name in ("step-9", "step-10", "step-10.new", "stale-1"):
                (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "said").unlink(missing_ok=True)
        code, said, _ = job(tmp_path, there, "exit 75", restart=restart or None)
        codes.append(code)
    assert codes == [75, 75, 75, 75, 75, 4, 4]
    assert said == [
        "dist-ft: restart 6 of job 10017 on n[1-2], from step 10",
        "dist-ft: job 10017 ends: 3 restarts, but no checkpoint after step 10",
    ]
    assert job(tmp_path, there, "exit 0")[0] == 0  # submitted again


def test_the_port_is_that_of_the_job_or_the_next_free_one(tmp_path):
    there = launch(*SMALL, output_dir=tmp_path / "run")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 20017))
        taken.listen()
        assert job(tmp_path, there, "exit 0")[1][-1] == "20018"
        there = launch(*SMALL, "launch.master_port=20017", output_dir=tmp_path / "run")
        assert job(tmp_path, there, "exit 0")[1][-1] == "20017"  # a port that the user sets is not changed


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *((None, None), ("UNLIMITED", None), ("30", 1800), ("30:10", 1810), ("4:00:00", 14400), ("1-2", 93600)),
        *(("1-2:30", 95400), ("2-00:00:10", 172810)),
    ],
)
def test_time_limits_of_slurm(text, seconds):
    assert time_limit_s(text) == seconds
    if text is not None and text.isdigit():
        assert time_limit_s(int(text)) == seconds


@pytest.mark.parametrize(
    ("words", "signal"),
    [
        ([], "USR1@120"),
        (["launch.time='4:00:00'"], "USR1@120"),
        (["launch.time='15'"], "USR1@90"),
        (["launch.time=15"], "USR1@90"),
        (["launch.time='5'"], None),
        (["train.stop_before_s=600"], "USR1@600"),
        (["train.stop_before_s=0"], None),
    ],
)
def test_workers_are_told_of_the_end_of_the_job(words, signal):
    launcher, plan = launch(*SMALL, *words)
    found = [line for line in launcher.render(plan).files["job.sbatch"].splitlines() if "--signal=" in line]
    assert found == ([f"#SBATCH --signal={signal}"] if signal else [])
