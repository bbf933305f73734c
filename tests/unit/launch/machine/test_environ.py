import os

from dist_ft.launch.machine.environ import Site, child_environment, find_site, is_secret, shared_environment


def test_secrets_are_never_shared():
    given = {
        "WANDB_API_KEY": "k",
        "HF_TOKEN": "t",
        "HF_SECRET": "s",
        "WANDB_PROJECT": "p",
        "HF_HOME": "/hf",
        "NCCL_DEBUG": "INFO",
        "HOME": "/root",
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_TWO_LINES": "a\nb",
    }
    assert shared_environment(given) == {
        "HF_HOME": "/hf",
        "NCCL_DEBUG": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_PROJECT": "p",
    }


def test_what_counts_as_a_secret():
    secrets = (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "HUGGING_FACE_HUB_TOKEN",
        "DB_PASSWORD",
        "X_TOKENS",
    )
    assert all(is_secret(name) for name in secrets)
    assert not any(is_secret(name) for name in ("TOKENIZERS_PARALLELISM", "HF_HOME", "NCCL_DEBUG", "KEYBOARD"))


def test_threads_are_the_cores_shared_out():
    assert [Site("p", "/", cores).threads(4) for cores in (16, 5, 2)] == [4, 1, 1]


def test_a_child_is_no_worker_of_another_job(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("RANK", "1")
    env = child_environment({"X": "1"})
    assert env["X"] == "1"
    assert env["PATH"] == os.environ["PATH"]
    assert not {"SLURM_PROCID", "RANK"} & set(env)


def test_this_machine():
    site = find_site()
    assert site.cores >= 1
    assert site.cwd == os.getcwd()
