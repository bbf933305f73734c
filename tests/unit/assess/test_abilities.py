"""Tests of lm-eval tasks from local files against log-probabilities and answers computed with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.assess import abilities, evaluate
from dist_ft.config.plan import read_plan, write_plan
from dist_ft.errors import MachineError, RequestError
from dist_ft.process.options import EvaluateOptions
from tests.runs import finish_run
from tests.samples import load_adapted

CHOICES = ["team: billing", "team: technical", "sales"]
ROWS = [
    {"q": "Refund my order", "choices": CHOICES, "answer": 0},
    {"q": "The screen of my new laptop is black since this morning", "choices": CHOICES, "answer": 1},
    {"q": "Hello", "choices": CHOICES, "answer": 2},
    {"q": "I was charged twice", "choices": CHOICES, "answer": 0},
    {"q": "It does not start", "choices": CHOICES, "answer": 1},
]
WORDS = 6  # maximum number of tokens of an answer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with a multiple-choice, a log-likelihood and a generation task over the same rows."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "Question: {{q}}\nAnswer:",
    }
    metrics = {"choose": ["acc", "acc_norm"], "go_on": ["perplexity", "acc"], "answer": ["exact_match"]}
    own: dict[str, dict[str, Any]] = {
        "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
        "go_on": {"output_type": "loglikelihood", "doc_to_target": " {{choices[answer]}}"},
        "answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": WORDS, "do_sample": False},
        },
    }
    for name, content in own.items():
        metric_list = [{"metric": metric} for metric in metrics[name]]
        text = yaml.safe_dump({"task": f"desk_{name}", **shared, **content, "metric_list": metric_list})
        (folder / f"{name}.yaml").write_text(text)
    return folder


def models_of(run: Path, base: Path) -> dict[str, Any]:
    return {"base": AutoModelForCausalLM.from_pretrained(base).eval(), "export": load_adapted(run, base)}


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, context: str, text: str, virtual: int = 0) -> float:
    """Return the log-probability of `text` given `context`, without padding."""
    ids = torch.tensor([tokenizer(context + text)["input_ids"]])
    before = len(tokenizer(context)["input_ids"])
    logits = model(input_ids=ids).logits[0, virtual:].log_softmax(-1)
    return float(logits[before - 1 : -1].gather(1, ids[0, before:, None]).sum())


def samples_of(run: Path, which: str, task: str) -> list[dict[str, Any]]:
    name = "predictions-lm-eval.jsonl" if which == "export" else f"predictions-lm-eval-{which}.jsonl"
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [row for row in rows if row["task"] == task]


def test_scores_are_those_of_log_probabilities_taken_by_hand(
    lora_run: Path, tiny_llama: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lm_eval=desk_choose,desk_go_on", f"lm_eval_path={tasks}", "lm_eval_chat=false"]
    evaluate.main([str(lora_run / "run.yaml"), *words])
    shown = capsys.readouterr()
    scores = json.loads((lora_run / "eval-validation.json").read_text())["lm_eval"]
    kept = json.loads((lora_run / "lm-eval.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    answers = {}
    for which, model in models_of(lora_run, tiny_llama).items():
        contexts = [f"Question: {row['q']}\nAnswer:" for row in ROWS]
        table = [[log_probability(model, tokenizer, c, f" {choice}") for choice in CHOICES] for c in contexts]
        chosen = samples_of(lora_run, which, "desk_choose")
        assert [row["doc_id"] for row in chosen] == [0, 1, 2, 3, 4]
        for row, expected in zip(chosen, table, strict=True):
            assert [float(value) for value, _ in row["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right = [max(range(3), key=row.__getitem__) == r["answer"] for row, r in zip(table, ROWS, strict=True)]
        by_length = [
            max(range(3), key=lambda n: row[n] / len(CHOICES[n])) == r["answer"]
            for row, r in zip(table, ROWS, strict=True)
        ]
        assert scores[which]["desk_choose/acc"] == pytest.approx(sum(right) / 5)
        assert scores[which]["desk_choose/acc_norm"] == pytest.approx(sum(by_length) / 5)
        given = [row[r["answer"]] for row, r in zip(table, ROWS, strict=True)]
        assert scores[which]["desk_go_on/perplexity"] == pytest.approx(math.exp(-sum(given) / 5), rel=1e-4)
        answers[which] = given
        assert kept["scores"][which]["desk_choose"]["acc"] == scores[which]["desk_choose/acc"]
    assert answers["base"] != answers["export"]
    assert kept["tasks"]["desk_choose"] == {"version": "Yaml", "num_fewshot": 0, "rows": 5}
    assert kept["chat_template"] is False and kept["warnings"] == []
    assert f"{scores['base']['desk_choose/acc_norm']:.4f} ± " in shown.out and "desk_choose acc " in shown.out
    noise = ("Building contexts", "Running loglikelihood", "`pretrained` model", "is defined, but")
    assert not [words for words in noise if words in shown.out + shown.err]


def test_answers_come_through_the_chat_template_and_end_where_training_ends_them(
    lora_run: Path, tiny_llama: Path, tasks: Path
) -> None:
    """The rows of the run are conversations; a batch contains rows of different lengths."""
    evaluate.main([str(lora_run / "run.yaml"), "lm_eval=desk_answer", f"lm_eval_path={tasks}", "lm_eval_limit=4"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert json.loads((lora_run / "lm-eval.json").read_text())["chat_template"] is True
    for which, model in models_of(lora_run, tiny_llama).items():
        said = []
        for row in ROWS[:4]:
            asked = [{"role": "user", "content": f"Question: {row['q']}\nAnswer:"}]
            ids = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**ids, max_new_tokens=WORDS, do_sample=False, eos_token_id=2, pad_token_id=0)
            said.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        rows = samples_of(lora_run, which, "desk_answer")
        assert [row["filtered_resps"][0].strip() for row in rows] == [text.strip() for text in said]


def test_examples_stand_before_the_question(lora_run: Path, tiny_llama: Path, tasks: Path) -> None:
    words = [f"lm_eval_path={tasks}", "lm_eval_chat=false", "lm_eval_limit=1", "model=base"]
    found = []
    for shots in (0, 2):
        evaluate.main([str(lora_run / "run.yaml"), "lm_eval=desk_choose", *words, f"lm_eval_num_fewshot={shots}"])
        kept = json.loads((lora_run / "lm-eval.json").read_text())
        assert kept["tasks"]["desk_choose"]["num_fewshot"] == shots and list(kept["scores"]) == ["base"]
        (row,) = samples_of(lora_run, "base", "desk_choose")
        found.append(row["filtered_resps"])
    assert found[0] != found[1]


def test_behind_virtual_tokens_log_probabilities_are_those_of_peft(
    tiny_llama: Path, run_cache: Path, tasks: Path, tmp_path: Path
) -> None:
    run = finish_run(tmp_path / "run", tiny_llama, {"name": "prompt", "num_virtual_tokens": 3}, run_cache)
    evaluate.main([str(run / "run.yaml"), "lm_eval=desk_choose", f"lm_eval_path={tasks}", "lm_eval_chat=false"])
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), models_of(run, tiny_llama)["export"]
    for row in samples_of(run, "export", "desk_choose"):
        context = f"Question: {row['doc']['q']}\nAnswer:"
        expected = [log_probability(model, tokenizer, context, f" {choice}", virtual=3) for choice in CHOICES]
        assert [float(value) for value, _ in row["filtered_resps"]] == pytest.approx(expected, rel=1e-4)


def test_what_lm_eval_warns_of_is_told(
    lora_run: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0] | {"q": "Refund " * 600}))
    task = yaml.safe_load((tasks / "choose.yaml").read_text()) | {"task": "desk_long"}
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(task))
    evaluate.main([str(lora_run / "run.yaml"), "lm_eval=desk_long", f"lm_eval_path={tmp_path}"])
    assert "exceeds model's maximum length (512). Truncating" in capsys.readouterr().out


def test_a_run_without_validation_data_is_asked_too(lora_run: Path, tasks: Path, tmp_path: Path) -> None:
    plan = read_plan(lora_run)
    data = plan.config.data.model_copy(update={"validation": None})
    config = plan.config.model_copy(update={"data": data, "output_dir": str(tmp_path)})
    write_plan(plan.model_copy(update={"config": config}))
    (tmp_path / "model").symlink_to(lora_run / "model")
    evaluate.main([str(tmp_path / "run.yaml"), "lm_eval=desk_choose", f"lm_eval_path={tasks}", "lm_eval_limit=2"])
    assert list(json.loads((tmp_path / "eval-validation.json").read_text())) == ["lm_eval"]
    with pytest.raises(RequestError, match=r"no data\.validation"):
        evaluate.main([str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lm_eval=desk_chose"], "did you mean desk_choose"),
        (["lm_eval=,"], "names no task"),
        (["lm_eval_limit=3"], "has no effect unless lm_eval is set"),
        (["lm_eval=desk_choose", "lm_eval_path=nowhere"], "is not a folder"),
        (["lm_eval=desk_choose", "lm_eval_limit=0"], "lm_eval_limit"),
        (["lm_eval=desk_lost"], "gone.jsonl"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_computed(
    lora_run: Path, tasks: Path, tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = yaml.safe_load((tasks / "choose.yaml").read_text()) | {"task": "desk_lost"}
    lost["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "gone.jsonl")}}
    for name in ("choose", "answer"):
        (tmp_path / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text())
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost))
    from lm_eval.tasks import TaskManager

    only_ours = lambda **options: TaskManager(**{**options, "include_defaults": False})  # noqa: E731  # loading lm-eval's own tasks takes 10 s
    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_ours)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_: pytest.fail("computed"))
    if len(words) == 1 and "limit" not in words[0]:
        words = [*words, f"lm_eval_path={tmp_path}"]
    with pytest.raises(RequestError) as caught:
        evaluate.main([str(lora_run / "run.yaml"), *words])
    assert said in str(caught.value)


def test_models_that_continue_no_text_and_a_missing_package_are_told(
    lora_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_plan(lora_run).config
    options = EvaluateOptions(lm_eval="desk_choose")
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install 'dist-ft\[lm-eval\]'"):
        abilities.find_abilities(config, options)
    other = config.model_dump(mode="json") | {"task": {"name": "sequence_classification", "max_length": 32}}
    with pytest.raises(RequestError, match="task=sequence_classification is not one"):
        abilities.find_abilities(type(config).model_validate(other), options)
