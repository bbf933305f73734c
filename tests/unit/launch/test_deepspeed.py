import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.errors import MachineError, RequestError
from dist_ft.launch import hosts
from dist_ft.launch.deepspeed import HostfileLauncher
from dist_ft.launch.hosts import Host, check_hosts, choose_hosts, read_hostfile
from tests.golden import check_golden
from tests.unit.launch.plans import SITE, plan_of

SITE_2 = replace(SITE, cwd="/home/ada", environment={"HF_HOME": 'a b"$(touch x)`id`\\%h', "NCCL_DEBUG": "INFO"})


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nn1 slots=2\n\nn2 slots=2 # the other\n")
    return path


def refused(path, text):
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_hostfile(path)
    return [(problem.where.removeprefix(f"{path}"), problem.rule) for problem in caught.value.problems]


def test_hostfile_is_read(hostfile):
    assert read_hostfile(hostfile) == [Host("n1", 2), Host("n2", 2)]


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=id slots=2",
        "n1;id slots=2",
        "$(id) slots=2",
        "n1 slots=x",
        "n1",
        "n1 slots=0",
        "u@n1 slots=1",
        "n 1 slots=1",
    ],
)
def test_hostfile_lines_that_are_refused(tmp_path, line):
    [(where, rule)] = refused(tmp_path / "hosts", f"n9 slots=1\n{line}\n")
    assert where == ":2"
    assert "is not HOST slots=N" in rule


def test_hostfile_as_a_whole(tmp_path):
    path = tmp_path / "hosts"
    assert refused(path, "n1 slots=1\nn1 slots=1\n") == [(":2", "n1 is listed twice")]
    assert refused(path, "# none\n") == [("", "lists no host")]
    assert "a different machine on each host" in refused(path, "localhost slots=2\nn2 slots=2\n")[0][1]
    assert len(refused(path, "a b c\nn1\n")) == 2
    with pytest.raises(RequestError, match="does not exist"):
        read_hostfile(tmp_path / "none")


def test_hosts_are_chosen():
    pool = [Host("n1", 4), Host("n2", 2), Host("n3", 2)]
    assert choose_hosts(pool, 2, 2) == (pool[:2], 2)
    assert choose_hosts(pool[1:], None, None) == (pool[1:], 2)
    for nodes, workers, rule in (
        (4, None, "has 3 hosts"),
        (None, None, "slots differ between hosts"),
        (None, 3, "n2 has 2 slots"),
    ):
        with pytest.raises(RequestError, match=rule):
            choose_hosts(pool, nodes, workers)


def test_rendered_as_it_was(hostfile):
    launcher = HostfileLauncher(SITE_2)
    plan = plan_of(launcher, ["launch=deepspeed", f"launch.hostfile={hostfile}", "engine=zero2"])
    assert (plan.nodes, plan.workers_per_node, plan.world_size) == (2, 2, 4)
    for name, text in launcher.render(plan).files.items():
        check_golden(f"deepspeed.{name}", text)


def test_the_environment_survives_a_remote_shell(hostfile, tmp_path):
    """DeepSpeed's runner puts values with special characters between double quotes."""
    launcher = HostfileLauncher(SITE_2)
    plan = plan_of(launcher, ["launch=deepspeed", f"launch.hostfile={hostfile}"])
    lines = dict(line.split("=", 1) for line in launcher.render(plan).files["workers.env"].splitlines())
    value = lines["HF_HOME"].replace("%%", "%")  # as pdsh does
    script = f'export HF_HOME="{value}"; export OMP_NUM_THREADS="{lines["OMP_NUM_THREADS"]}"'
    script += '; printf %s "$HF_HOME,$OMP_NUM_THREADS"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    home, threads = said.rsplit(",", 1)
    assert home == SITE_2.environment["HF_HOME"]
    assert int(threads) >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_paths_that_a_remote_shell_would_change_are_refused(hostfile):
    launcher = HostfileLauncher(SITE)  # its working directory contains a space
    with pytest.raises(RequestError) as caught:
        plan_of(launcher, ["launch=deepspeed", f"launch.hostfile={hostfile}"], "'/runs/$(id)'")
    assert {problem.where for problem in caught.value.problems} == {"output_dir", "current folder"}


def test_pdsh_must_be_there(hostfile, tmp_path, monkeypatch):
    launcher = HostfileLauncher(SITE_2)
    plan = plan_of(launcher, ["launch=deepspeed", f"launch.hostfile={hostfile}"], tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="pdsh"):
        launcher.submit(plan)


GOOD = {"python": hosts.platform.python_version(), "dist_ft": "/x", "own": "10.0.0.1", "free": True}


@pytest.mark.parametrize(
    ("change", "status", "stderr", "rule"),
    [
        ({}, 0, "", None),
        (None, 255, "ssh: connect to host n1 port 22: No route to host", "ssh cannot log in: .*No route"),
        (None, 127, "sh: 1: exec: /opt/python: not found", "/opt/python does not exist"),
        (None, 2, "sh: 1: cd: can't cd to /home", "cannot run a worker: .*can't cd"),
        ({"dist_ft": False}, 0, "", "cannot import dist_ft"),
        ({"python": "3.1.0"}, 0, "", "has python 3.1.0, but this machine"),
        ({"marker": None}, 0, "", "cannot read files"),
        ({"free": False}, 0, "", "port 29500 is in use there"),
        ({"own": "127.0.1.1"}, 0, "", "its host name resolves to 127"),
    ],
)
def test_every_host_is_judged(tmp_path, monkeypatch, change, status, stderr, rule):
    def answer(host, command, limit_s):
        assert command.startswith("cd /home && exec /opt/python")
        if change is None:
            return subprocess.CompletedProcess([], status, "", stderr)
        marker = next(tmp_path.glob(".seen-*")).read_text()
        versions = {name: hosts._version(name) for name in hosts.PACKAGES}
        said = {**GOOD, "marker": marker, "versions": versions, **(change if host.name == "n1" else {})}
        return subprocess.CompletedProcess([], 0, "motd\n" + json.dumps(said), "")

    monkeypatch.setattr(hosts, "_ssh", answer)
    pool = [Host("n1", 1), Host("n2", 1)]
    problems = check_hosts(pool, python="/opt/python", cwd="/home", run_dir=tmp_path, port=29500)
    if rule is None:
        assert problems == []
    else:
        assert problems[0].where == "n1"
        assert re.search(rule, problems[0].rule)
        assert len(problems) == (2 if change is None else 1)
    assert list(tmp_path.glob(".seen-*")) == []


def test_a_single_host_may_have_any_name(tmp_path, monkeypatch):
    said = {**GOOD, "own": "127.0.1.1", "versions": {name: hosts._version(name) for name in hosts.PACKAGES}}

    def answer(host, command, limit_s):
        marker = next(Path(tmp_path).glob(".seen-*")).read_text()
        return subprocess.CompletedProcess([], 0, json.dumps({**said, "marker": marker}), "")

    monkeypatch.setattr(hosts, "_ssh", answer)
    assert check_hosts([Host("n1", 1)], python="/p", cwd="/", run_dir=tmp_path, port=1) == []


def test_the_probe_runs(tmp_path):
    marker = tmp_path / "marker"
    marker.write_text("word")
    run = subprocess.run(
        [sys.executable, "-c", hosts.PROBE, marker, "0", "torch"], capture_output=True, text=True, check=True
    )
    said = json.loads(run.stdout)
    assert said["marker"] == "word"
    assert said["python"] == GOOD["python"]
    assert said["versions"]["torch"]
