"""Samples and model inputs written by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dist_ft
from dist_ft.model.anatomy import find_anatomy
from dist_ft.state import BuiltModel, Sample
from dist_ft.testing.words import WORDS

SUPPORT_DESK = Path(dist_ft.__file__).parent / "data" / "support_desk" / "train.jsonl"
LABELS = ["calm", "glad", "cross"]


def given(token_ids: Iterable[int]) -> dict[str, torch.Tensor]:
    """What a model is given of at most 64 tokens."""
    return {"input_ids": torch.tensor([[int(token) for token in token_ids][:64]])}


def on_meta(build: Callable[[bool], Any]) -> Any:
    """The modules that `build(False)` gives, on the meta device."""
    with torch.device("meta"):
        return build(False)


def anatomized(model: Any) -> BuiltModel:
    """A model to which no method was applied, with its anatomy."""
    return BuiltModel(model, find_anatomy(model))


def apply_method(method: Any, model: Any) -> BuiltModel:
    """The model with a method applied, and its anatomy."""
    anatomy = find_anatomy(model)
    return BuiltModel(method.apply(anatomy), anatomy)


def samples_of(segments: Iterable[Sequence[Mapping[str, np.ndarray]]]) -> list[Sample]:
    """Samples in their order."""
    return [Sample(parts, index) for index, parts in enumerate(segments)]


def question_row(context: str, question: str, *answers: str | tuple[str, int]) -> dict[str, Any]:
    """A row of SQuAD; of an answer without its place the first is taken."""
    pairs = [(given, context.find(given)) if isinstance(given, str) else given for given in answers]
    return {
        "context": context,
        "question": question,
        "answers": {"text": [text for text, _ in pairs], "answer_start": [place for _, place in pairs]},
    }


def write_labelled_rows(path: Path, count: int = 37) -> list[dict[str, Any]]:
    """Texts of 2 to 20 words, the label told by the first; unevenly many of each."""
    dice = random.Random(3)
    rows = []
    for _ in range(count):
        label = dice.choices(range(3), weights=[5, 3, 1])[0]
        text = " ".join([WORDS[label], *dice.choices(WORDS[3:], k=dice.randint(1, 19))])
        rows.append({"text": text, "label": label, "label_text": LABELS[label]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def write_questions(path: Path, count: int = 11) -> None:
    """Contexts of one to four pieces; the answer, of one or two words, stands behind the word that is asked for."""
    dice = random.Random(5)
    rows = []
    for _ in range(count):
        words = dice.choices(WORDS[8:], k=dice.randint(4, 40))
        cue, at = dice.choice(WORDS[:8]), dice.randrange(len(words) - 2)
        answer = " ".join(words[at : at + dice.randint(1, 2)])
        start = len(" ".join([*words[:at], cue, ""]))
        context = " ".join([*words[:at], cue, *words[at:]])
        rows.append({"question": cue, "context": context, "answers": {"text": [answer], "answer_start": [start]}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(**settings: Any) -> Any:
    """The LoRA method with these keys."""
    from dist_ft.config.method import LoraConfig
    from dist_ft.method.lora import Lora

    return Lora(LoraConfig(name="lora", **settings))


class SeparateExperts(nn.Module):
    """A router that is a linear layer, and experts that are modules of their own."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))


def load_adapted(run: Path, base: Path) -> Any:
    """The exported adapter of a run on its base, loaded by peft alone."""
    import peft
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model").eval()
