"""Tests of added tokens: new embedding rows are trained and exported, and the original rows stay bitwise identical."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from dist_ft.checks.request import check
from dist_ft.config.plan import Plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.data.render.template import find_end_token
from dist_ft.data.render.tokenizer import load_tokenizer, open_tokenizer
from dist_ft.data.store.identity import split_folder
from dist_ft.errors import RequestError
from dist_ft.export.card import card_of_run
from dist_ft.export.merge import main as export_main
from dist_ft.export.probe import probe_model
from dist_ft.export.write import export_run
from dist_ft.families import ModelRecipe, architecture_of, build_method
from dist_ft.model.load import attention_of
from dist_ft.prepare import prepare
from dist_ft.testing import tiny

TOKENS = ["<|tool|>", "<|call|>"]
IDS = [512, 513]
TEXT = "<|tool|>hello<|call|> there"
LORA = {"name": "lora", "r": 4}
CARD = re.compile(r"## Load\n\n```python\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Path]:
    """Base models with 512 embeddings, the vocabulary size of the tokenizer; `padded` has 520."""
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "tied": ("llama", {"vocab_size": 512, "tie_word_embeddings": True}),
        "untied": ("llama", {"vocab_size": 512, "tie_word_embeddings": False}),
        "padded": ("llama", {"vocab_size": 520, "tie_word_embeddings": False}),
        "gpt2": ("gpt2", {"vocab_size": 512}),
    }
    folders = {}
    for name, (architecture, changes) in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tiny.save(architecture, folders[name], **changes)
        AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folders[name])
    return folders


def make_config(base: Path, top: Path, method: dict[str, Any], **changes: Any) -> RunConfig:
    data = top / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{TEXT} {i}"}) + "\n" for i in range(4)), encoding="utf-8")
    given: dict[str, Any] = {
        "run_name": "r",
        "output_dir": str(top / "run"),
        "model": {"dtype": "float32", "name_or_path": str(base), "add_tokens": TOKENS},
        "task": {"name": "causal_lm", "max_length": 32, "packing": False},
        "data": {"train": str(data), "cache_dir": str(top / "cache")},
        "method": method,
        "engine": {"name": "ddp"},
        "optim": {},
        "train": {"max_steps": 1, "global_batch_size": 2, "per_device_train_batch_size": 2},
        "track": {"wandb": "off"},
        "launch": {"name": "local"},
    }
    return RunConfig.model_validate({**given, **changes})


class Trained:
    """A model with perturbed trainable weights, exported as at the end of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.prepared = prepare(config)
        plan = Plan(
            config=config, nodes=1, workers_per_node=1, world_size=1, accumulation_steps=1, git_sha="",
            created="2026-01-01", origins={},
        )  # fmt: skip
        write_plan(plan)
        architecture = architecture_of(config, self.prepared.facts)
        attention = attention_of(config.model, self.prepared.model_dir, torch.device("cpu"), architecture)
        method = build_method(config)
        self.recipe = ModelRecipe(config, self.prepared.model_dir, attention, architecture, method)
        self.model: Any = self.recipe.build(weights=True).model
        torch.manual_seed(1)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        self.model.eval()
        tokenizer = open_tokenizer(config, self.prepared.tokenizer_dir)
        self.ids = tokenizer(TEXT)["input_ids"]
        self.inputs = {"input_ids": torch.tensor([self.ids]), "attention_mask": torch.ones(1, len(self.ids)).long()}
        self.out = Path(config.output_dir) / "model"
        whole = config.method.whole
        export_run(
            method=method,
            model_config=config.model,
            model_dir=self.prepared.model_dir,
            architecture=architecture,
            bare=self.recipe.build_meta().model,
            tokenizer=tokenizer,
            end_token_id=find_end_token(tokenizer, config.task),
            weights=((n, p.data) for n, p in self.model.named_parameters() if p.requires_grad or whole),
            out=self.out,
            card=card_of_run(plan, self.prepared, plan.run_dir),
            probe=probe_model(self.model, self.inputs),
        )

    def logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (model or self.model).eval()(**self.inputs).logits[0].float()


def embeddings_of(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("shape", ["tied", "untied", "gpt2"])
def test_a_full_model_comes_back_by_transformers_alone(bases: dict[str, Path], tmp_path: Path, shape: str) -> None:
    trained = Trained(make_config(bases[shape], tmp_path, {"name": "full"}))
    loaded = AutoModelForCausalLM.from_pretrained(trained.out)
    assert loaded.config.vocab_size == 514 and torch.equal(trained.logits(loaded), trained.logits())
    inputs, outputs = embeddings_of(loaded)
    assert (inputs is outputs) == (shape != "untied")
    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    assert tokenizer(TEXT)["input_ids"] == trained.ids and [i for i in trained.ids if i >= 512] == IDS
    assert tokenizer.decode(trained.ids, skip_special_tokens=True) == "hello there"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["tied", "untied", "gpt2"])
def test_an_adapter_holds_the_new_rows_and_its_card_loads_it(
    bases: dict[str, Path], tmp_path: Path, shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name_or_path": str(bases[shape]), "add_tokens": TOKENS, "dtype": dtype}
    trained = Trained(make_config(bases[shape], tmp_path, LORA, model=model))
    found = CARD.search((trained.out / "README.md").read_text())
    assert found is not None
    lines = found[1].replace("')", f"', dtype='{dtype}')", 1)
    monkeypatch.chdir(trained.out)
    names: dict[str, Any] = {}
    exec(lines, names)
    loaded = names["model"]
    assert isinstance(loaded, peft.PeftModel)
    # With a bfloat16 model, training computes the adapter under autocast, but peft computes it in float32.
    assert torch.allclose(trained.logits(loaded), trained.logits(), atol=1e-6 if dtype == "float32" else 2e-2)
    base = AutoModelForCausalLM.from_pretrained(bases[shape], dtype=dtype)
    merged = loaded.merge_and_unload()
    for old, new in zip(embeddings_of(base), embeddings_of(merged), strict=True):
        mean = old.float().mean(dim=0)
        assert torch.equal(new[:512], old), "original rows are unchanged"
        assert not torch.isclose(new[512:].float(), mean, atol=1e-3).all(dim=1).any(), "added rows are trained"


@pytest.mark.parametrize("shape", ["tied", "untied", "gpt2", "padded"])
def test_merged_it_is_a_whole_model(bases: dict[str, Path], tmp_path: Path, shape: str) -> None:
    trained = Trained(make_config(bases[shape], tmp_path, LORA))
    export_main([str(tmp_path / "run"), "merge=true"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model-merged")
    assert torch.allclose(trained.logits(loaded), trained.logits(), atol=1e-5)
    inputs, outputs = embeddings_of(loaded)
    assert (inputs is outputs) == (shape in ("tied", "gpt2")) and len(inputs) == (520 if shape == "padded" else 514)


def test_new_rows_start_at_the_mean_and_old_ones_as_they_were(bases: dict[str, Path], tmp_path: Path) -> None:
    for shape in ("tied", "untied"):
        top = tmp_path / shape
        top.mkdir()
        trained = Trained(make_config(bases[shape], top, LORA))
        model = trained.recipe.build(weights=True).model
        base = embeddings_of(AutoModelForCausalLM.from_pretrained(bases[shape]))
        wrapped = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
        for old, new in zip(base, wrapped, strict=True):
            assert torch.equal(new[:512], old)
            assert torch.allclose(new[512:], old.mean(dim=0).expand(2, -1))
        learns = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        assert len(learns) == (1 if shape == "tied" else 2) and all("trainable_tokens_delta" in n for n in learns)


def test_a_rank_without_weights_builds_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    for shape, method in (("tied", {"name": "full"}), ("untied", LORA), ("gpt2", LORA)):
        top = tmp_path / shape
        top.mkdir()
        recipe = Trained(make_config(bases[shape], top, method)).recipe
        have, lack = (
            {n: (p.shape, p.dtype, p.requires_grad) for n, p in recipe.build(weights=weights).model.named_parameters()}
            for weights in (True, False)
        )
        assert have == lack


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        ({"name": "qlora", "r": 4}, "nf4"),
        ({"name": "qlora", "r": 4}, "int8"),
        ({**LORA, "init_lora_weights": "pissa"}, "none"),
    ],
    ids=str,
)
def test_over_a_quantised_base_and_one_that_moves(
    bases: dict[str, Path], tmp_path: Path, method: dict[str, Any], quantization: str
) -> None:
    """The export itself checks that the reloaded model has the logits of the trained model."""
    model = {
        "dtype": "float32",
        "name_or_path": str(bases["untied"]),
        "add_tokens": TOKENS,
        "quantization": quantization,
    }
    trained = Trained(make_config(bases["untied"], tmp_path, method, model=model))
    card = (trained.out / "README.md").read_text()
    assert card.count("base.resize_token_embeddings(514") == (1 if quantization == "none" else 2)


def test_noise_reaches_them(bases: dict[str, Path], tmp_path: Path) -> None:
    train = {"max_steps": 1, "global_batch_size": 2, "per_device_train_batch_size": 2, "neftune_noise_alpha": 10.0}
    trained = Trained(make_config(bases["tied"], tmp_path, LORA, train=train))
    trained.model.train()
    one, two = (trained.model(**trained.inputs).logits for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(trained.logits(), trained.logits())


def test_a_padded_vocabulary_has_room(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = Trained(make_config(bases["padded"], tmp_path, LORA))
    base = AutoModelForCausalLM.from_pretrained(bases["padded"])
    assert "resize_token_embeddings" not in (trained.out / "README.md").read_text()
    loaded = peft.PeftModel.from_pretrained(base, trained.out)
    assert torch.allclose(trained.logits(loaded), trained.logits(), atol=1e-6)


def test_a_chat_template_may_be_made_of_them(bases: dict[str, Path], tmp_path: Path) -> None:
    """The end-of-turn token is an added token and is supervised."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokens = ["<|user|>", "<|assistant|>", "<|end|>"]
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    changes = {
        "model": {"dtype": "float32", "name_or_path": str(bases["tied"]), "add_tokens": tokens},
        "task": {"name": "instruction", "max_length": 32, "packing": False, "chat_template": str(template)},
    }
    config = make_config(bases["tied"], tmp_path, {"name": "full"}, **changes)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(config) == []
    segment = prepare(config).train.first_sample().segments[0]
    ids, labels = segment["input_ids"].tolist(), segment["labels"].tolist()
    assert [i for i in ids if i >= 512] == [512, 514, 513, 514]
    assert labels == [*[-100] * 4, *ids[-2:]]
    tokenizer = load_tokenizer(config, str(bases["tied"]))
    assert find_end_token(tokenizer, config.task) == 514


def test_the_cache_knows_them(bases: dict[str, Path], tmp_path: Path) -> None:
    with_tokens = make_config(bases["tied"], tmp_path, LORA)
    without = make_config(bases["tied"], tmp_path, LORA, model={"dtype": "float32", "name_or_path": str(bases["tied"])})
    assert split_folder(with_tokens, "train") != split_folder(without, "train")


@pytest.mark.parametrize("name", ["ia3", "prompt", "prefix", "p_tuning", "bitfit", "ln_tuning", "freeze", "adapter"])
def test_other_methods_are_refused(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    problems = [p for p in check(make_config(bases["tied"], tmp_path, {"name": name})) if p.where == "model.add_tokens"]
    assert len(problems) == 1 and "method=lora, qlora or full" in problems[0].way_out


def test_wrong_tokens_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    def with_tokens(*tokens: str) -> RunConfig:
        model = {"dtype": "float32", "name_or_path": str(bases["tied"]), "add_tokens": list(tokens)}
        return make_config(bases["tied"], tmp_path, LORA, model=model)

    assert "more than once" in str(check(with_tokens("<a>", "<b>", "<a>")))
    with pytest.raises(RequestError, match="'<|im_end|>': the tokenizer already has this token".replace("|", r"\|")):
        prepare(with_tokens("<a>", "<|im_end|>"))
    for saved in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}):
        config = make_config(bases["tied"], tmp_path, {**LORA, **saved})
        with pytest.raises(RequestError, match=r"rows of model\.add_tokens learn there"):
            Trained(config)
