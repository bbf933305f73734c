"""Layouts of micro-batches over every causal language model of transformers: no row changes another row's logits.

`python -m tests.unit.model.test_isolation` prints the table of docs/models.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dist_ft.model.attention.choice import AttentionChoice, choose_attention
from dist_ft.model.miniature import build_miniature, draw_weights

from .library import CAUSAL, DOCUMENT, class_of, published

LENGTHS = (3, 14, 9, 1)


class Found(NamedTuple):
    """What the product chose for a model type, and how far its logits are from those of rows alone."""

    choice: AttentionChoice
    deviation: float | None  # relative, of the worst row; None if no model can be built from the configuration


def build(model_type: str, kernel: str) -> PreTrainedModel | None:
    """Build a model whose weights are other ones than those of the product's proof."""
    for dtype in (torch.float64, torch.float32):
        try:
            model = build_miniature(class_of(model_type), published(model_type), kernel, dtype)
            assert model(input_ids=torch.tensor([[9, 8]]), use_cache=False).logits.isfinite().all()
        except Exception:
            continue
        draw_weights(model, seed=11)
        return model
    return None


def logits_by_layout(model: Any, rows: Sequence[Tensor], choice: AttentionChoice) -> list[Tensor]:
    """Compute the logits of rows [length] in the layout of the choice."""
    if choice.padding_free:
        model.set_attn_implementation(choice.implementation)
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        lengths = tuple(len(row) for row in rows)
        ids = torch.cat(list(rows))
        together = model(input_ids=ids[None], position_ids=positions[None], document_lengths=lengths, use_cache=False)
        return list(together.logits[0].split(lengths))
    if choice.why_single:
        return [
            model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], use_cache=False).logits[0]
            for row in rows
        ]
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [line[: len(row)] for line, row in zip(padded, rows, strict=True)]


def measure(model_type: str) -> Found:
    """Compare the rows of a micro-batch with each row alone."""
    settings = published(model_type)
    choice = choose_attention("auto", class_of(model_type), settings, torch.device("cpu"), torch.float32)
    model = build(model_type, choice.kernel)
    if model is None:
        return Found(choice, None)
    rows = [torch.randint(8, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    with torch.no_grad():
        alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
        found = logits_by_layout(model, rows, choice)
    if not all(logits.isfinite().all() for logits in alone):
        return Found(choice, None)
    return Found(choice, max(float((a - b).norm() / b.norm()) for a, b in zip(found, alone, strict=True)))


def measure_all() -> dict[str, Found]:
    """Measure every class once; some model types share one."""
    types = {class_of(name): name for name in CAUSAL}
    types |= {kind: kind.config_class.model_type for kind in types if kind.config_class.model_type in CAUSAL}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: measure(name) for name in sorted(types.values())}


def layout_of(found: Found) -> str:
    """Return the layout in the words of the table."""
    if found.choice.padding_free:
        return "documents"
    return "one row" if found.choice.why_single else "padded"


def table_of(found: dict[str, Found]) -> str:
    """Render the table of docs/models.md."""
    lines = ["| model type | layout | why not documents |", "| --- | --- | --- |"]
    for model_type, entry in found.items():
        why = (entry.choice.why_padded or "").replace("|", "\\|")
        lines.append(f"| `{model_type}` | {layout_of(entry)} | {why} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def library() -> dict[str, Found]:
    """Every causal language model of the installed transformers."""
    return measure_all()


@pytest.mark.slow
def test_no_row_changes_another(library: dict[str, Found]) -> None:
    wrong = {name: entry.deviation for name, entry in library.items() if not (entry.deviation or 0.0) < 1e-4}
    assert not wrong, f"relative deviation of the logits of a row in a micro-batch from those of the row alone: {wrong}"


@pytest.mark.slow
def test_common_models_take_documents(library: dict[str, Found]) -> None:
    common = "cohere2 deepseek_v3 ernie4_5 exaone4 gemma2 gemma3 gemma4 glm4 glm4_moe gpt_oss granite llama mistral"
    common += " mixtral olmo2 phi3 qwen2 qwen3 qwen3_moe seed_oss smollm3"
    assert {name: layout_of(library[name]) for name in common.split()} == dict.fromkeys(common.split(), "documents")


@pytest.mark.slow
def test_the_table_is_true(library: dict[str, Found]) -> None:
    """The document is for the pinned version, so that an upgrade of the pin fails here until the table is new."""
    pins = (DOCUMENT.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    if f"transformers=={transformers.__version__} " not in pins:
        pytest.skip(f"transformers {transformers.__version__} is not the version of constraints.txt")
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"transformers {transformers.__version__}" in text and table_of(library) in text


def choose(model_type: str, **changes: Any) -> AttentionChoice:
    settings = published(model_type)
    for key, value in changes.items():
        setattr(settings, key, value)
    return choose_attention("auto", class_of(model_type), settings, torch.device("cpu"), torch.float32)


def test_the_configuration_decides() -> None:
    """The same class keeps documents apart or not, by the layers that its configuration asks for."""
    attention_only = choose("lfm2", layer_types=["full_attention"] * 6)
    with_convolutions = choose("lfm2")
    assert attention_only.padding_free and not with_convolutions.padding_free
    assert "change each other" in str(with_convolutions.why_padded)


def test_a_proof_leaves_no_trace() -> None:
    """Neither the random numbers of the run nor the configuration change."""
    settings = published("qwen3")
    before, state = settings.to_dict(), torch.get_rng_state()
    choose_attention("auto", class_of("qwen3"), settings, torch.device("cpu"), torch.float32)
    assert settings.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_made_small_gets_padded_rows() -> None:
    choice = choose("reformer")
    assert not choice.padding_free and "no small ReformerModelWithLMHead" in str(choice.why_padded)


if __name__ == "__main__":
    print(table_of(measure_all()))
