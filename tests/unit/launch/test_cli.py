import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_ft.config.plan import read_plan
from dist_ft.errors import DistFtError
from dist_ft.launch import cli, process
from tests.unit.launch.plans import ROWS

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = sorted(cli.COMMANDS)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return ["data=jsonl", "data.train=rows.jsonl", "run_name=first"]


@pytest.fixture
def started(monkeypatch):
    calls = []

    def run_module(words):
        plan = read_plan(words[1]) if len(words) > 1 and words[1].endswith("run.yaml") else None
        calls.append((words, plan))
        return 0

    monkeypatch.setattr(process, "run_module", run_module)
    return calls


def test_help_imports_nothing_slow():
    code = "import sys\nfrom dist_ft.launch import cli\n"
    code += "def heavy(names): return [name for name in names.split() if name in sys.modules]\n"
    code += (
        "def show(*words):\n    try: cli.main([*words, '--help'])\n    except SystemExit as end: assert not end.code\n"
    )
    code += "show(); show('train')\nfound = heavy('hydra pydantic yaml argcomplete torch')\n"
    code += f"for command in {COMMANDS}: show(command)\n"
    code += "found += heavy('hydra omegaconf torch rich transformers argcomplete')\nprint(found, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stderr.strip() == "[]"
    for command in COMMANDS:
        assert f"usage: dist-ft {command}" in run.stdout


def test_words_may_follow_options(words, started, capsys):
    assert cli.main(["plan", words[0], "--brief", *words[1:]]) == 0
    assert "first in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "-m", "method.r=4"], "-m: is not an option of this command\n    → use `dist-ft sweep`"),
        (["train", "--multirun"], "use `dist-ft sweep`"),
        (["train", "--cfg", "job"], "use `dist-ft plan … show=config`"),
        (["train", "--cfg=job"], "use `dist-ft plan … show=config`"),
        (["train", "--config-name", "x"], "give the file itself: `dist-ft train FILE.yaml`"),
        (["train", "--config-path=x"], "write --config-dir DIR"),
        (["plan", "--config-d", "x"], "--config-d: is not an option of this command"),
        (["plan", "--brie"], "--brie: is not an option of this command"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "arguments are required: COMMAND"),
        (["doctor", "x", "--y"], "--y: is not an option"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
        (["plan", "show=confg"], "show: Input should be 'plan' or 'config'"),
    ],
)
def test_options_of_others_and_mistakes_have_one_look(arguments, said, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("dist-ft: invalid request\n  ")
    assert said in err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith("dist-ft 0.")


def test_plan_prints_the_configuration_as_a_file(words, started, capsys, tmp_path):
    assert cli.main(["plan", *words, "show=config"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["plan", "again.yaml", "show=config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "again.yaml").read_text()
    assert started == []


def test_plan_shows_all_and_writes_nothing(words, started, capsys, tmp_path):
    assert cli.main(["plan", *words, "method.r=4", "launch.workers_per_node=2"]) == 0
    said = capsys.readouterr().out
    assert "32 rows per step = 2 workers × 4 rows per micro-batch × 4 micro-batches" in said
    assert "method.r = 4   (command line)" in said
    assert "train.resume → starts from step 0" in said
    assert f"bash {tmp_path}/runs/first/launch.sh" in said
    assert "-m dist_ft.launch.torchrun --nnodes=1 --nproc-per-node=2" in said
    assert not (tmp_path / "runs").exists()
    [(called, plan)] = started
    assert called[0] == "dist_ft.inspect.model"
    assert plan.config.method.r == 4
    assert not Path(called[1]).exists()


def test_splits_that_are_left_out_are_told(words, started, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(process, "run", lambda rendered, run_dir: 0)
    line = "left out: that of conf/data/support_desk.yaml belongs to its own data.train"
    words = [word for word in words if word != "data=jsonl"]
    assert cli.main(["plan", *words, "--brief"]) == 0
    assert f"  data.validation = None   ({line})\n  data.test = None   ({line})\n" in capsys.readouterr().out
    assert cli.main(["train", *words]) == 0
    assert f"dist-ft: data.validation: {line}\ndist-ft: data.test: {line}\n" in capsys.readouterr().out
    plan = read_plan(tmp_path / "runs" / "first")
    assert plan.config.data.validation is None
    assert plan.origins["data.test"] == line
    assert cli.main(["train", *words, "train.eval_steps=2"]) == 2
    assert f"has no effect: there is no validation data ({line})" in capsys.readouterr().err


def test_adapted_batch_sizes_are_told(words, started, capsys, monkeypatch):
    monkeypatch.setattr(process, "run", lambda rendered, run_dir: 0)
    assert cli.main(["train", *words, "launch.workers_per_node=3"]) == 0
    line = "dist-ft: train.global_batch_size → 36 (32 cannot be divided into equal micro-batches of 3 workers)\n"
    assert line in capsys.readouterr().out


def test_data_hands_its_own_words_on(words, started):
    assert cli.main(["data", *words, "rows=3"]) == 0
    [(called, plan)] = started
    assert called[0] == "dist_ft.inspect.rows"
    assert called[2:] == ["rows=3"]
    assert plan.config.run_name == "first"
    assert cli.main(["data", *words, "rows=many"]) == 2
    assert len(started) == 1


def test_train_writes_prepares_and_launches(words, started, monkeypatch, tmp_path):
    monkeypatch.setattr("dist_ft.data.store.identity.is_prepared", lambda config: False)
    launched = []
    monkeypatch.setattr(process, "run", lambda rendered, run_dir: launched.append((rendered, run_dir)) or 75)
    assert cli.main(["train", *words]) == 75
    folder = tmp_path / "runs" / "first"
    assert started[0][0] == ["dist_ft.prepare", str(folder / "run.yaml")]
    [(rendered, run_dir)] = launched
    assert run_dir == folder
    assert (folder / "launch.sh").read_text() == rendered.files["launch.sh"]
    assert yaml.safe_load((folder / "run.yaml").read_text())["config"]["run_name"] == "first"


def test_train_ends_where_preparing_fails(words, monkeypatch):
    monkeypatch.setattr("dist_ft.data.store.identity.is_prepared", lambda config: False)
    monkeypatch.setattr(process, "run_module", lambda words: 2)
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("launched"))
    assert cli.main(["train", *words]) == 2


def test_no_secret_is_written(words, started, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "secret-5678")
    monkeypatch.setenv("HF_TOKEN", "secret-5678")
    monkeypatch.setattr("dist_ft.data.store.identity.is_prepared", lambda config: True)
    monkeypatch.setattr(process, "run", lambda rendered, run_dir: 0)
    assert cli.main(["train", *words]) == 0
    assert started == []
    assert "secret-5678" not in "".join(f.read_text() for f in (tmp_path / "runs").rglob("*") if f.is_file())


def test_all_problems_are_printed_without_a_traceback(words, capsys):
    code = cli.main(["train", *words, "train.global_batch_size=31", "data.validation=none.jsonl", "train.eval_steps=3"])
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("dist-ft: invalid request\n")
    for place in ("train.global_batch_size: ", "data.validation, "):
        assert place in said
    assert "Traceback" not in said


def test_the_wrong_command_for_a_launcher(words, capsys):
    assert cli.main(["train", *words, "launch=slurm", "launch.workers_per_node=1"]) == 2
    assert "dist-ft submit launch=slurm" in capsys.readouterr().err
    assert cli.main(["submit", *words]) == 2
    assert "dist-ft train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "module", "word"),
    [
        ("eval", "assess.evaluate", "split=test"),
        ("generate", "assess.generate", "prompt=a b"),
        ("export", "export.merge", "merge=true"),
    ],
)
def test_outcomes_take_a_run(words, started, monkeypatch, tmp_path, capsys, command, module, word):
    monkeypatch.setattr("dist_ft.data.store.identity.is_prepared", lambda config: True)
    monkeypatch.setattr(process, "run", lambda rendered, run_dir: 0)
    assert cli.main(["train", *words]) == 0
    assert cli.main([command, "run=runs/first", word]) == 0
    assert started[0][0] == [f"dist_ft.{module}", "runs/first/run.yaml", word]
    assert cli.main([command]) == 2
    assert "must be given exactly once" in capsys.readouterr().err
    assert cli.main([command, "run=runs/none"]) == 2
    for wrong in ("word", f"x{word}"):
        assert cli.main([command, "run=runs/first", wrong]) == 2
        assert f"{wrong}: is not an option of this command" in capsys.readouterr().err
    assert len(started) == 1, "words are read before a process with torch is started"


def test_schema_is_json(capsys):
    assert cli.main(["schema"]) == 0
    assert "experiment" in json.loads(capsys.readouterr().out)["properties"]


def test_our_own_mistakes_have_a_traceback(words, monkeypatch):
    monkeypatch.setattr("dist_ft.launch.planning.check", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", *words])
    assert not issubclass(ZeroDivisionError, DistFtError)


def test_ctrl_c_is_quiet(words, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_ft.launch.planning.check", interrupt)
    assert cli.main(["plan", *words]) == 130
    assert capsys.readouterr().err == "dist-ft: interrupted\n"
