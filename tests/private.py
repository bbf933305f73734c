"""Models, rows and plain loops over single rows that private engines are held against."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import nn
from torch.nn import functional

from dist_ft.config.task import Seq2SeqConfig, SequenceClassificationConfig
from dist_ft.model.anatomy import find_anatomy
from dist_ft.privacy.ddp import Private
from dist_ft.privacy.mechanism import Privacy
from dist_ft.process.place import Place
from dist_ft.state import Batch, BuiltModel, Facts, Sample
from dist_ft.task.batches.tokens import collate_padded, sum_losses
from dist_ft.task.seq2seq import Seq2Seq
from dist_ft.task.sequence_classification import SequenceClassification
from dist_ft.testing import tiny
from tests.samples import lora

CPU = torch.device("cpu")
CLIP = 0.4
LENGTHS = (9, 3, 12, 5, 5, 7, 2)
CAUSAL, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"

# architecture, auto class, settings, task, whether Opacus's hooks are right for it
MODELS: dict[str, tuple[str, str, dict[str, Any], str, bool]] = {
    "llama": ("llama", CAUSAL, {"tie_word_embeddings": False}, "causal", True),
    "llama-tied": ("llama", CAUSAL, {"tie_word_embeddings": True}, "causal", True),
    "gpt2-tied": ("gpt2", CAUSAL, {}, "causal", True),
    "bert": ("bert", CLASSES, {"num_labels": 3}, "classes", True),
    "gpt2": ("gpt2", CLASSES, {"num_labels": 3, "pad_token_id": 0}, "classes", True),
    "t5": ("t5", "AutoModelForSeq2SeqLM", {}, "seq2seq", False),  # relative positions are looked up once for all rows
}
TASK_OF = {name: task for name, (_, _, _, task, _) in MODELS.items()}
HOOKED = {name for name, (_, _, _, _, hooked) in MODELS.items() if hooked}


def make_model(name: str, method: str = "full") -> nn.Module:
    architecture, auto_class, settings, _, _ = MODELS[name]
    model: nn.Module = tiny.build(architecture, auto_class, **settings)
    if method == "full":
        return model
    head = ["score"] if name == "gpt2" else []
    adapted: nn.Module = lora(r=3).apply(find_anatomy(model, task_head=head))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:  # they start at zero, where A has no gradient
            nn.init.normal_(parameter, std=0.2)
    return adapted


def make_segments(task: str) -> list[list[dict[str, np.ndarray]]]:
    dice = np.random.default_rng(5)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = dice.integers(1, tiny.VOCABULARY, length)
        if task == "causal":
            labels = ids.copy()
            labels[: i % length] = -100
            rows.append([{"input_ids": ids, "labels": labels}])
        elif task == "classes":
            rows.append([{"input_ids": ids, "label": np.array([i % 3])}])
        else:  # sources and targets whose padded widths are the same
            rows.append([{"input_ids": ids}, {"input_ids": dice.integers(1, tiny.VOCABULARY, LENGTHS[-1 - i])}])
    return rows


def make_task(task: str) -> tuple[Any, Any]:
    """Collate and loss."""
    if task == "causal":
        return collate_padded, sum_losses
    if task == "classes":
        facts = Facts(labels=("a", "b", "c"))
        subject: Any = SequenceClassification(SequenceClassificationConfig(name="sequence_classification"), facts)
    else:
        subject = Seq2Seq(Seq2SeqConfig(name="seq2seq"), Facts())
    return subject.collate, subject.loss


def own_loss(model: nn.Module, task: str, row: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """The mean loss of one row that is alone, in transformers' own words."""
    ids = torch.from_numpy(row[0]["input_ids"])[None]
    if task == "causal":
        return model(input_ids=ids, labels=torch.from_numpy(row[0]["labels"])[None]).loss
    if task == "classes":
        return functional.cross_entropy(model(input_ids=ids).logits, torch.from_numpy(row[0]["label"]))
    return model(input_ids=ids, labels=torch.from_numpy(row[1]["input_ids"])[None]).loss


def clipped_sum(model: nn.Module, task: str, clip: float = CLIP) -> tuple[list[torch.Tensor], list[float]]:
    """Abadi et al. 2016, algorithm 1, lines 3 to 5 without noise, one row after another; and the rows' norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, norms = [torch.zeros_like(p) for p in parameters], []
    for row in make_segments(task):
        gradients = torch.autograd.grad(own_loss(model, task, row), parameters, allow_unused=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
        norms.append(norm)
        for held, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                held.add_(gradient / max(1.0, norm / clip))
    return total, norms


def make_privacy(**changes: Any) -> Privacy:
    given = {"noise_multiplier": 0.0, "sample_rate": 0.1, "delta": 1e-5, "max_grad_norm": CLIP, "expected_rows": 7.0}
    return Privacy(**{**given, "seed": 3, **changes})  # type: ignore[arg-type]


def batches(task: str, per_device: int) -> Iterator[Batch]:
    collate, _ = make_task(task)
    rows = [Sample(segments, i) for i, segments in enumerate(make_segments(task))]
    for first in range(0, len(rows), per_device):
        yield collate(rows[first : first + per_device])


def feed(engine: Any, task: str, per_device: int) -> float:
    loss = make_task(task)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that rows go one by one
        sums = [engine.forward_backward(b, loss, torch.tensor(1.0), last=False).loss for b in batches(task, per_device)]
    return float(sum(sums))


def make_ddp(model: nn.Module, privacy: Privacy, dtype: torch.dtype = torch.float32) -> Private:
    engine = Private(privacy, device=CPU, place=Place(), dtype=dtype, max_grad_norm=1.0)
    engine.setup(
        BuiltModel(model, find_anatomy(model)), lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2)
    )
    return engine


def batch_of_one(task: str, row: int, rows: int) -> Batch:
    """A micro-batch of rows from `row` on, of which the first alone has targets: its sum is what that row adds."""
    collate, _ = make_task(task)
    segments = make_segments(task)
    chosen = [(row + i) % len(segments) for i in range(rows)]
    found = [segments[i] for i in chosen]
    if rows > 1:
        assert task == "causal", "labels of other tasks cannot be left out"
        rest = [[{**part, "labels": np.full_like(part["labels"], -100)} for part in parts] for parts in found[1:]]
        found = [found[0], *rest]
    return collate([Sample(parts, i) for parts, i in zip(found, chosen, strict=True)])


def added_norms(make: Any, sums_of: Any, name: str, clip: float, *, hooks: bool) -> list[float]:
    """The norm of what each row really adds to the sum of a private engine that computes in bfloat16."""
    task, norms = TASK_OF[name], []
    engine = make(make_model(name), make_privacy(hooks=hooks, max_grad_norm=clip), torch.bfloat16)
    loss = make_task(task)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that rows go one by one
        for row in range(len(LENGTHS)):
            before = [held.clone() for held in sums_of(engine)]
            engine.forward_backward(batch_of_one(task, row, 3 if hooks else 1), loss, torch.tensor(1.0), last=True)
            # in float64: the sum itself is float32
            added = [now.double() - held.double() for now, held in zip(sums_of(engine), before, strict=True)]
            norms.append(math.sqrt(sum(float(part.square().sum()) for part in added)))
            engine.model.zero_grad(set_to_none=True)
            for held in getattr(engine, "sums", ()):
                held.zero_()
    assert (engine.hooks is not None) == hooks
    return norms


def turn_rows(layer: nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[Any, torch.Tensor]:
    """A sampler whose sum over rows is right and whose rows are not."""
    found = compute_linear_grad_sample(layer, activations, backprops)
    return {parameter: samples.roll(1, dims=0) for parameter, samples in found.items()}
