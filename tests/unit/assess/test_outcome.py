"""Tests of `dist-ft eval`, `generate` and `export` on the folder of a run, against transformers and PEFT."""

from __future__ import annotations

import io
import json
from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.assess import evaluate, generate
from dist_ft.assess.turns import Question
from dist_ft.checkpoint import store as checkpoint
from dist_ft.config.plan import Plan, read_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.data.render.template import find_end_token
from dist_ft.data.render.tokenizer import open_tokenizer
from dist_ft.errors import RequestError, TrainingError
from dist_ft.export.merge import main as export_main
from dist_ft.export.probe import probe_model
from dist_ft.export.write import export_run
from dist_ft.families import ModelRecipe, build_method
from dist_ft.inspect import model as inspection
from dist_ft.model.load import attention_of
from dist_ft.prepare import prepare
from dist_ft.process import comm
from dist_ft.process.place import Place
from dist_ft.state import CAUSAL_LM, NamedState, Progress
from dist_ft.track.jsonl import JsonLines
from tests.samples import given

ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in [
        ("Refund my order", "team: billing"),
        ("Screen is black", "team: technical"),
        ("Hello there", "team: x"),
    ]
]
CHAT = [{"role": "user", "content": "Refund my order"}]


def make_config(folder: Path, model: Path, method: dict[str, object], cache: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_name": "r",
            "output_dir": str(folder),
            "model": {"name_or_path": str(model)},
            "task": {"name": "instruction", "max_length": 128},
            "data": {
                "train": str(cache / "rows.jsonl"),
                "validation": str(cache / "rows.jsonl"),
                "cache_dir": str(cache),
            },
            "method": method,
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
            "track": {"wandb": "off"},
            "launch": {"name": "local"},
        }
    )


def make_run(folder: Path, model: Path, method: dict[str, object], cache: Path) -> Path:
    """Create the folder of a run without training: add noise to the weights, export them and save a checkpoint."""
    (cache / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = make_config(folder, model, method, cache)
    write_plan(
        Plan(
            config=config, nodes=1, workers_per_node=1, world_size=1, accumulation_steps=1, git_sha="abc",
            created="2026-01-01", origins={},
        )
    )  # fmt: skip
    prepared = prepare(config)
    attention = attention_of(config.model, prepared.model_dir, torch.device("cpu"), CAUSAL_LM)
    recipe = ModelRecipe(config, prepared.model_dir, attention, CAUSAL_LM, build_method(config))
    trained = recipe.build(weights=True).model
    torch.manual_seed(3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {name: p.data for name, p in trained.named_parameters() if p.requires_grad}
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    log = JsonLines(folder / "metrics.jsonl")
    log.log({"eval/loss": 3.25}, step=0)
    log.log({"eval/loss": 1.75}, step=7)
    log.close()
    export_run(
        method=build_method(config),
        model_config=config.model,
        model_dir=prepared.model_dir,
        bare=recipe.build_meta().model,
        tokenizer=tokenizer,
        end_token_id=find_end_token(tokenizer, config.task),
        weights=weights.items(),
        out=folder / "model",
        card="# card\n",
        probe=probe_model(trained, given(prepared.train.open_table().example(0)["input_ids"])),
    )
    comm.join(Place(), comm.open_store(Place(), 10), torch.device("cpu"), 10)
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    moments = {f"exp_avg/{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    checkpoint.save(folder / "checkpoints", NamedState(tensors | moments, 7), Progress(7, 1, "ddp", None, 1.75, 7, 0))
    comm.leave()
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, cache: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("lora"), tiny_llama, {"name": "lora", "r": 4}, cache)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, cache: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("full"), tiny_llama, {"name": "full"}, cache)


def by_hand(run: Path, base: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model").eval()


@torch.no_grad()
def loss_by_hand(model: torch.nn.Module, tokenizer: object) -> float:
    """Compute the mean loss over all assistant tokens row by row, with the labels derived from the text."""
    total, count = 0.0, 0
    for row in ROWS:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["messages"][1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
        total += float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def test_evaluation_of_base_and_tuned_is_that_of_a_loop_by_hand(
    lora_run: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(lora_run / "run.yaml"), "baseline=true"])
    written = json.loads((lora_run / "eval-validation.json").read_text())["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    assert written["export"]["loss"] == pytest.approx(loss_by_hand(by_hand(lora_run, tiny_llama), tokenizer), rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert written["base"]["loss"] == pytest.approx(loss_by_hand(base, tokenizer), rel=1e-5)
    shown = capsys.readouterr().out
    assert f"{written['export']['loss']:.4f}" in shown and f"{written['base']['loss']:.4f}" in shown


def test_what_was_forgotten_is_that_of_a_loop_by_hand(
    lora_run: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "The screen is black and the invoice is wrong. " * 40
    (tmp_path / "general.txt").write_text(text)
    evaluate.main([str(lora_run / "run.yaml"), f"general={tmp_path / 'general.txt'}"])
    written = json.loads((lora_run / "eval-validation.json").read_text())["general"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(text.strip())["input_ids"] + [tokenizer.eos_token_id])
    models = {"base": AutoModelForCausalLM.from_pretrained(tiny_llama), "export": by_hand(lora_run, tiny_llama)}
    for which, model in models.items():
        sums = [(float(model(b[None], labels=b[None]).loss) * (len(b) - 1), len(b) - 1) for b in ids.split(128)]
        loss = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
        assert written[which]["loss"] == pytest.approx(loss, rel=1e-4)
    assert "nats per token" in capsys.readouterr().out


def test_forgetting_behind_virtual_tokens_is_measured_over_padded_rows(
    tiny_llama: Path, cache: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, {"name": "prompt", "num_virtual_tokens": 2}, cache)
    (tmp_path / "general.txt").write_text("The screen is black.\n")
    evaluate.main([str(run / "run.yaml"), f"general={tmp_path / 'general.txt'}"])
    written = json.loads((run / "eval-validation.json").read_text())["general"]
    assert written["base"]["loss"] != written["export"]["loss"]


def test_one_prompt_is_answered_as_transformers_does(
    lora_run: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main([str(lora_run / "run.yaml"), "prompt=Refund my order", "max_new_tokens=12"])
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = by_hand(lora_run, tiny_llama)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text and capsys.readouterr().out == text + "\n"


def test_rows_side_by_side(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main([str(lora_run / "run.yaml"), "prompts=validation:2", "model=both", "max_new_tokens=4"])
    shown = capsys.readouterr().out
    assert shown.count("\nbase ") == shown.count("\ntuned ") == 2
    assert "Refund my order" in shown and "team: technical" in shown and "Hello there" not in shown


def test_a_chat_remembers(lora_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    def answer(self: object, question: Question) -> str:
        asked.append([str(message["content"]) for message in question.messages or []])
        return f"answer {len(asked)}"

    monkeypatch.setattr(generate.Speaker, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\nclear\nthree\nexit\nfour\n"))
    generate.main([str(lora_run / "run.yaml")])
    assert asked == [["one"], ["one", "answer 1", "two"], ["three"]]
    assert "tuned: answer 3" in capsys.readouterr().out


def test_merging_gives_a_model_for_transformers_alone(
    lora_run: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    export_main([str(lora_run / "run.yaml"), "merge=true", f"out={out}"])
    assert "logits differ by" in capsys.readouterr().out
    probe = probe_model(by_hand(lora_run, tiny_llama), given(range(5, 45)))
    merged = probe_model(AutoModelForCausalLM.from_pretrained(out), given(range(5, 45)))
    torch.testing.assert_close(merged.logits, probe.logits, rtol=1e-4, atol=1e-5)
    assert not (out / "adapter_config.json").exists()
    card = (out / "README.md").read_text()
    assert "3.2500" in card and "1.7500" in card and 'AutoModelForCausalLM.from_pretrained(".")' in card
    with pytest.raises(RequestError, match="already exists"):
        export_main([str(lora_run / "run.yaml"), "merge=true", f"out={out}"])


def test_a_merge_in_bfloat16(full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    export_main([str(lora_run / "run.yaml"), "merge=true", "dtype=bfloat16", f"out={tmp_path / 'm'}"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["step-7", "latest"])
def test_a_checkpoint_gives_the_same_model_as_the_run(
    kind: str, name: str, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    run = request.getfixturevalue(f"{kind}_run")
    out = tmp_path / "again"
    export_main([str(run / "run.yaml"), f"checkpoint={name}", f"out={out}"])
    if kind == "lora":
        one, other = (
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
            for folder in (run / "model", out)
        )
    else:
        one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "model", out))
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_a_torn_checkpoint_is_refused(full_run: Path, tmp_path: Path) -> None:
    file = next((full_run / "checkpoints" / "step-7").glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(RequestError, match="does not match the size and SHA-256"):
            export_main([str(full_run / "run.yaml"), "checkpoint=step-7", f"out={tmp_path / 'x'}"])
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (export_main, ["merge=true"], "no adapter to merge"),
        (export_main, ["checkpoint=step-9"], "available checkpoints: latest, step-7"),
        (export_main, ["mrege=true"], "did you mean merge"),
        (export_main, ["dtype=int8"], "dtype"),
        (evaluate.main, ["split=test"], "the run has no data.test"),
        (evaluate.main, ["split=trian"], "split"),
        (generate.main, ["prompt=a", "prompts=b"], "cannot be combined with prompt"),
        (generate.main, ["prompts=nowhere.txt"], "cannot be read"),
        (generate.main, ["prompts=test:3"], "data.test"),
        (generate.main, ["prompt=a", "max_new_tokens=0"], "max_new_tokens"),
        (generate.main, ["prompt=a", "max_new_tokens=600"], "exceed the model's limit of 512"),
    ],
)
def test_wrong_words_are_named(full_run: Path, main: object, words: list[str], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        main([str(full_run / "run.yaml"), *words])
    assert said in str(caught.value)


def test_a_run_without_an_export_says_so(full_run: Path, tmp_path: Path) -> None:
    plan = read_plan(full_run)
    moved = plan.model_copy(update={"config": plan.config.model_copy(update={"output_dir": str(tmp_path)})})
    write_plan(moved)
    for main in (evaluate.main, generate.main, export_main):
        with pytest.raises(RequestError, match="no exported model yet"):
            main([str(tmp_path / "run.yaml"), *(["prompt=a"] if main is generate.main else [])])


def test_an_export_that_lost_a_tensor_is_not_evaluated(full_run: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = full_run / "model" / "model.safetensors"
    whole = file.read_bytes()
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    try:
        with pytest.raises(TrainingError, match=r"missing keys on loading: model\.norm\.weight"):
            evaluate.main([str(full_run / "run.yaml")])
    finally:
        file.write_bytes(whole)


def test_inspection_shows_model_method_memory_and_data(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspection.main([str(lora_run / "run.yaml")])
    shown = capsys.readouterr().out
    for words in ("embeddings", "adapters", "layers.*.self_attn.q_proj.lora_A", "AdamW moments", "supervised tokens"):
        assert words in shown
