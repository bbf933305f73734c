import socket
import subprocess

import pytest

from dist_ft.errors import MachineError, RequestError
from dist_ft.launch.launcher import shell_lines, write_rendered
from dist_ft.launch.local import LocalLauncher
from dist_ft.launch.machine import ports
from tests.golden import check_golden
from tests.unit.launch.plans import GPU_SITE, SITE, plan_of


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("local_alone", SITE, ["launch.workers_per_node=1", "engine=zero2"]),
        ("local_torchrun", SITE, ["engine=fsdp"]),
        ("local_torchrun_port", SITE, ["launch.port=29511"]),
        ("local_zero", SITE, ["engine=zero3"]),
        ("local_zero_gpu", GPU_SITE, ["engine=zero2", "launch.port=29511"]),
    ],
)
def test_rendered_as_it_was(name, site, words):
    launcher = LocalLauncher(site)
    rendered = launcher.render(plan_of(launcher, words))
    check_golden(f"{name}.launch.sh", rendered.files["launch.sh"])
    assert rendered.command == ("bash", "/runs/first/launch.sh")


def test_rendering_is_pure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launcher = LocalLauncher(SITE)
    plan = plan_of(launcher, [], tmp_path / "run")
    assert launcher.render(plan) == launcher.render(plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_hostile_paths_are_quoted(tmp_path, engine):
    folder = tmp_path / "a'b $(touch x) `id`; c"
    launcher = LocalLauncher(SITE)
    plan = plan_of(launcher, [f"engine={engine}"], f'"{folder}"')
    text = launcher.render(plan).files["launch.sh"].replace("exec /opt/env/bin/python", "printf '%s\\n'")
    text = text.replace("cd '/home/ada/my work'", f"cd {tmp_path}").replace(
        "port=$(/opt/env/bin/python", "port=$(python3"
    )
    said = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == str(folder / "run.yaml")
    assert not list(tmp_path.iterdir())


def test_workers_are_one_a_gpu_or_two():
    assert plan_of(LocalLauncher(SITE), []).world_size == 2
    assert plan_of(LocalLauncher(GPU_SITE), []).world_size == 2
    assert plan_of(LocalLauncher(SITE), ["launch.workers_per_node=4"]).world_size == 4
    with pytest.raises(RequestError, match="3 workers, but 2 GPUs"):
        plan_of(LocalLauncher(GPU_SITE), ["launch.workers_per_node=3"])


def test_a_port_in_use_is_told_with_its_holder(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not ports.is_free(port)
        launcher = LocalLauncher(SITE)
        plan = plan_of(launcher, [f"launch.port={port}"], tmp_path / "run")
        with pytest.raises(MachineError, match=f"port {port} is in use by process .*pid") as caught:
            launcher.submit(plan)
        assert caught.value.exit_code == 3
        assert not (tmp_path / "run").exists()
    assert ports.is_free(port)


def test_what_was_rendered_is_what_is_written(tmp_path):
    launcher = LocalLauncher(SITE)
    plan = plan_of(launcher, [], tmp_path / "run")
    rendered = launcher.render(plan)
    write_rendered(plan, rendered)
    script = tmp_path / "run" / "launch.sh"
    assert script.read_text() == rendered.files["launch.sh"]
    assert script.stat().st_mode & 0o111
    assert (tmp_path / "run" / "logs").is_dir()
    assert [path.name for path in script.parent.glob(".*")] == []


def test_long_commands_have_an_option_a_line():
    assert shell_lines(["a", "--b", "c d"]) == "a --b 'c d'"
    assert shell_lines(["a", "--b=" + "x" * 99, "-m", "c"]) == "a \\\n  --b=" + "x" * 99 + " \\\n  -m c"
