"""Virtual tokens under heads for labels: read where the tokens stand, saved with the head, refused where silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from dist_ft.config.method import MethodConfig
from dist_ft.config.task import SequenceClassificationConfig, TokenClassificationConfig
from dist_ft.errors import RequestError
from dist_ft.families import method_of
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.load import find_task_head
from dist_ft.state import Anatomy, Facts
from dist_ft.task.sequence_classification import SequenceClassification
from dist_ft.task.token_classification import TokenClassification
from dist_ft.testing import tiny
from tests.samples import samples_of

VIRTUAL = 4
NAMES = ("prompt", "prefix", "p_tuning")
FACTS = Facts(labels=("a", "b", "c"), label_counts=(1, 1, 1), rows=3)
ROWS = [[7, 8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]
TASKS: dict[str, Any] = {
    "Sequence": SequenceClassification(SequenceClassificationConfig(name="sequence_classification"), FACTS),
    "Token": TokenClassification(TokenClassificationConfig(name="token_classification"), FACTS),
}
CASES = [
    (shape, kind, name)
    for shape in ("bert", "roberta", "gpt2", "llama")
    for kind in TASKS
    for name in NAMES
    if kind == "Token" or shape in ("bert", "roberta") or name == "prefix"
]


def build(shape: str, kind: str) -> Any:
    model = tiny.build(shape, f"AutoModelFor{kind}Classification", num_labels=3, pad_token_id=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # of heads whose rate is no setting
            module.p = 0.0
    return model


def anatomy_of(model: Any) -> Anatomy:
    return find_anatomy(model, task_head=find_task_head(model))


def virtual(name: str) -> Any:
    given = {"name": name, "num_virtual_tokens": VIRTUAL}
    return method_of(TypeAdapter(MethodConfig).validate_python(given))


def batch_of(kind: str, rows: list[list[int]]) -> Any:
    segments = []
    for number, row in enumerate(rows):
        ids = np.array(row)
        if kind == "Token":
            tags = {"labels": ids % 3, "tags": ids % 3, "words": np.arange(len(ids))}
            segments.append([{"input_ids": ids, **tags}])
        else:
            segments.append([{"input_ids": ids, "label": np.array([number % 3])}])
    return TASKS[kind].collate(samples_of(segments))


@pytest.mark.parametrize(("shape", "kind", "name"), CASES)
def test_padding_changes_nothing_and_all_of_it_learns(shape: str, kind: str, name: str, tmp_path: Path) -> None:
    """Logits of padded rows are those of each row alone; prompts stand in front of the row's own embeddings."""
    method, model = virtual(name), build(shape, kind)
    adapted = method.apply(anatomy_of(model))
    task = TASKS[kind]
    together = task._logits(adapted, batch_of(kind, ROWS))
    alone = torch.cat([task._logits(adapted, batch_of(kind, [row])) for row in ROWS])
    assert torch.allclose(together, alone, atol=1e-5)
    task.loss(adapted, batch_of(kind, ROWS)).loss.backward()
    learned = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learned.values())
    head = {f"base_model.{part}" for part in find_task_head(model)}
    assert {n.split(".modules_to_save")[0] for n in learned if "modules_to_save" in n} == head
    assert {n.split(".")[0] for n in learned if "modules_to_save" not in n} == {"prompt_encoder"}

    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.eval()
    wanted = task._logits(adapted, batch_of(kind, ROWS))
    method.export(adapted, [(n, p.detach().clone()) for n, p in learned.items()], tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(shape, kind), tmp_path).eval()
    assert torch.allclose(task._logits(loaded, batch_of(kind, ROWS)), wanted, atol=1e-6)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 1 + sum("modules_to_save" in n for n in learned) and "prompt_embeddings" in stored


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "opt", "bloom", "qwen3"])
def test_a_class_read_from_the_last_token_is_refused(shape: str, name: str) -> None:
    """transformers finds the last token by its id; given embeddings it takes the last place, padding or not."""
    with pytest.raises(RequestError, match="would read the class of shorter rows from padding"):
        virtual(name).apply(anatomy_of(build(shape, "Sequence")))


def test_a_model_that_takes_no_keys_and_values_is_refused() -> None:
    with pytest.raises(RequestError, match="does not accept past_key_values"):
        virtual("prefix").apply(anatomy_of(tiny.build("modernbert")))


def test_a_model_whose_width_peft_does_not_find_is_refused() -> None:
    with pytest.raises(RequestError, match=r"peft does not support it for DistilBert.*token_dim"):
        virtual("prompt").apply(anatomy_of(build("distilbert", "Sequence")))


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_all_rows_before_an_encoder_decoder_are_read(name: str) -> None:
    """peft's default is as many again for the decoder, which it never puts there."""
    model = virtual(name).apply(find_anatomy(tiny.build("t5")))
    ids = torch.arange(3, 9)[None]
    prompts: list[torch.Tensor] = []
    model.prompt_encoder["default"].register_forward_hook(lambda module, given, found: prompts.append(found))
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids)
    (gradient,) = torch.autograd.grad(found.logits.logsumexp(-1).sum(), prompts)
    assert gradient.shape[-2] == VIRTUAL and bool((gradient.abs().sum(-1) > 0).all())
