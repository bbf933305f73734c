"""Losses in chunks equal those of all logits at once, with all gradients, and never hold more logits than a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.attention.documents import DOCUMENTS
from dist_ft.model.head import OutputHead, attach_head
from dist_ft.state import Batch
from dist_ft.task.batches.tokens import collate_documents, collate_padded, sum_log_probabilities, sum_losses, sum_scores
from dist_ft.testing import tiny
from tests.samples import lora, samples_of

SMALL = {**tiny.DECODER, "vocab_size": 97, "pad_token_id": 0, "attn_implementation": "eager"}
OTHERS = {
    "granite": ("Granite", {"logits_scaling": 7.0}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "phi": ("Phi", {}),  # a head with a bias
    "vaultgemma": ("VaultGemma", {"head_dim": 8, "final_logit_softcapping": 2.0}),
}
ROWS = 3


def build(name: str, **changes: Any) -> Any:
    if name not in OTHERS:
        return tiny.build(name, attn_implementation="eager", **changes)
    prefix, own = OTHERS[name]
    config = getattr(transformers, f"{prefix}Config")(**SMALL | own | changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


def micro_batch(*, padded: bool = True) -> Batch:
    rows = [np.arange(1, 1 + length) * 7 % 97 for length in (5, 9, 3)]
    samples = samples_of([[{"input_ids": row, "labels": np.where(row % 5, row, -100)}] for row in rows])
    return (collate_padded if padded else collate_documents)(samples)


def attach(model: Any, rows: int = ROWS) -> OutputHead:
    head, reason = attach_head(model)
    assert head is not None, reason
    head.rows = rows
    return head


def plain(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each target from the logits that the model returns by itself."""
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions].float()
    return functional.cross_entropy(logits, batch.targets, reduction="none")


def gradients(losses: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = torch.linspace(0.5, 2, len(losses))  # losses of documents may count differently
    found = torch.autograd.grad((losses * weights).sum(), [p for _, p in named], allow_unused=True)
    return dict(zip([name for name, _ in named], found, strict=True))


def assert_same(model: nn.Module, head: OutputHead, batch: Batch) -> None:
    expected = plain(model, batch)
    losses, right = head.token_losses(model, batch, width=batch.inputs["input_ids"].shape[1], judged=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    best = model(**batch.inputs).logits.flatten(0, 1)[batch.positions].argmax(-1)
    assert torch.equal(right, best == batch.targets)
    wanted, found = gradients(expected, model), gradients(losses, model)
    for name, gradient in wanted.items():
        other = found[name]
        assert (other is None) == (gradient is None), name
        if other is not None and gradient is not None:
            assert float((other - gradient).norm()) <= 2e-5 * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "granite", "cohere", "phi", "vaultgemma", "qwen3_moe", "bert", "modernbert"]
)
@pytest.mark.parametrize("rows", [ROWS, 100])
def test_losses_and_gradients_are_those_of_all_logits(name: str, rows: int) -> None:
    model = build(name).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # so that soft caps and scales matter
    assert_same(model, attach(model, rows), micro_batch())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_adapted_heads(tied: bool) -> None:
    model = build("llama", tie_word_embeddings=tied)
    assert_same(model, attach(model), micro_batch())
    adapted = lora(r=2, target_modules=["q_proj", "lm_head"]).apply(find_anatomy(build("llama")))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(torch.randn_like(parameter) * ("lora_B" in name))
    assert_same(adapted, attach(adapted.get_base_model()), micro_batch())  # type: ignore[operator]


def test_documents_padded_rows_scores_and_log_probabilities() -> None:
    model = build("llama")
    sums: list[list[Tensor]] = []
    for padded in (True, False):
        model.set_attn_implementation("eager" if padded else DOCUMENTS["eager"])
        batch = micro_batch(padded=padded)
        for head in (None, attach(model)):
            result = sum_scores(model, batch, head)
            one = [result.loss, result.weight, *result.counts.values(), *sum_log_probabilities(model, batch, head)]
            sums.append([*one, sum_losses(model, batch, head).loss])
    for other in sums[1:]:
        for a, b in zip(other, sums[0], strict=True):
            torch.testing.assert_close(a, b)


def test_label_smoothing() -> None:
    model, batch = build("llama"), micro_batch()
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions].float()
    expected = functional.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=0.2)
    head, width = attach(model), batch.inputs["input_ids"].shape[1]
    losses, _ = head.token_losses(model, batch, width=width, smoothing=0.2)
    torch.testing.assert_close(losses, expected)


def test_an_encoder_decoder() -> None:
    model = build("t5")
    ids = torch.arange(1, 11).view(2, 5)
    positions = torch.tensor([0, 3, 6, 9])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids + 2}
    batch = Batch(inputs, positions + 5, positions, positions, 10)
    assert_same(model, attach(model), batch)


def test_a_micro_batch_without_targets_reaches_every_parameter() -> None:
    """Ranks without targets take part in collectives."""
    model, batch = build("llama"), micro_batch().without_targets()
    loss = sum_losses(model, batch, attach(model)).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


class Largest(TorchDispatchMode):
    """Records the largest number of rows of a tensor with one column for each word, except the head itself."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else (result,):
            if isinstance(found, Tensor) and found.dim() and found.shape[-1] == 97 and found.shape != (32, 97):
                self.rows = max(self.rows, found.numel() // 97)
        return result


@pytest.mark.parametrize("padded", [False, True])
def test_never_more_logits_than_a_chunk(padded: bool) -> None:
    model = build("llama", tie_word_embeddings=False)
    model.set_attn_implementation("eager" if padded else DOCUMENTS["eager"])
    found = []
    for head in (attach(model), None):
        with Largest() as largest:
            sum_losses(model, micro_batch(padded=padded), head).loss.backward()
        found.append(largest.rows)
    assert found[0] == ROWS < found[1]


@pytest.mark.parametrize(
    ("weight", "frozen"), [("lm_head.weight", False), ("model.layers.1.mlp.down_proj.weight", True)]
)
def test_gradients_in_bfloat16_are_as_exact_as_from_all_logits(weight: str, frozen: bool) -> None:
    """There are 120 chunks: if those of a head were summed in bfloat16, the error would be several times that."""
    torch.manual_seed(0)
    model = build("llama", tie_word_embeddings=False).bfloat16()
    ids = torch.randint(1, 97, (8, 60))
    positions = torch.arange(8 * 60)
    batch = Batch({"input_ids": ids}, ids.flatten(), positions, positions, ids.numel())
    exact = build("llama", tie_word_embeddings=False)
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    for one in (exact, model):
        one.lm_head.requires_grad_(not frozen)
    wanted = gradients(plain(exact, batch), exact)[weight]
    errors = []
    for losses in (plain(model, batch), attach(model, 4).token_losses(model, batch, width=60)[0]):
        found = gradients(losses, model)[weight]
        assert found is not None and wanted is not None
        errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    assert errors[1] < 1.2 * errors[0] < 0.05, errors


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi"])
def test_a_frozen_head_is_computed_once(name: str) -> None:
    model = build(name, tie_word_embeddings=False).requires_grad_(False).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.get_input_embeddings().weight.requires_grad_()
    batch, calls = micro_batch(), []
    head = attach(model)
    assert_same(model, head, batch)
    compute = head.compute
    head.compute = lambda rows: calls.append(len(rows)) or compute(rows)  # type: ignore[func-returns-value]
    losses, _ = head.token_losses(model, batch, width=batch.inputs["input_ids"].shape[1])
    losses.sum().backward()
    assert sum(calls) == len(batch.targets) and max(calls) == ROWS


def test_generation_sees_logits() -> None:
    model = build("llama").eval()
    ids = torch.arange(1, 6)[None]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    head = attach(model)
    head.token_losses(model, micro_batch(), width=9)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bart", "changes logits after its head"), ("deberta", "no output embeddings|no small")],
)
def test_other_models_are_refused_with_the_reason(name: str, reason: str) -> None:
    if name == "deberta":
        model: Any = transformers.DebertaForSequenceClassification(
            transformers.DebertaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        )
    else:
        model = build(name)
    head, why = attach_head(model)
    assert head is None and any(part in why for part in reason.split("|"))


def test_dropout_in_the_head_is_refused() -> None:
    model = build("llama")
    model.lm_head = nn.Sequential(nn.Dropout(0.1), model.lm_head)
    head, why = attach_head(model)
    assert head is None and "dropout" in why


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_chunks_follow_from_the_vocabulary() -> None:
    head, reason = attach_head(build("llama"))
    assert head is not None and head.rows == 256 * 2**20 // (12 * 97) and "vocabulary of 97" in reason
    always, _ = attach_head(build("llama"), always=True)
    assert always is not None and always.rows == 128
