"""NEFTune's noise and a model's own dropout, against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, T5Config
from transformers.integrations.neftune import neftune_post_forward_hook

from dist_ft.errors import RequestError
from dist_ft.model.noise import add_embedding_noise, set_dropout

ALPHA = 5.0


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 16)

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return self.embeddings(input_ids)


@pytest.fixture
def reader() -> Reader:
    torch.manual_seed(0)
    model = Reader()
    add_embedding_noise(model, model.embeddings, ALPHA)
    return model


def of_transformers(reader: Reader, ids: torch.Tensor) -> torch.Tensor:
    embeddings = nn.Embedding(50, 16, _weight=reader.embeddings.weight.detach())
    embeddings.neftune_noise_alpha = ALPHA
    embeddings.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(1)
    return embeddings(ids)


def test_a_single_document_gets_the_noise_of_transformers(reader: Reader) -> None:
    ids = torch.arange(12)[None]
    torch.manual_seed(1)
    noisy = reader(input_ids=ids, document_lengths=(12,))
    torch.testing.assert_close(noisy, of_transformers(reader, ids), rtol=0, atol=1e-6)
    assert not torch.equal(noisy, reader.embeddings.weight[:12][None])


@pytest.mark.parametrize("layout", ["documents", "padded"])
def test_a_document_is_measured_by_its_own_length(reader: Reader, layout: str) -> None:
    lengths = (4, 400)
    if layout == "documents":
        ids = torch.zeros(1, 404, dtype=torch.int64)
        noise = reader(input_ids=ids, document_lengths=lengths) - reader.embeddings.weight[0]
        pieces = noise[0].split(lengths)
    else:
        mask = torch.tensor([[1] * n + [0] * (400 - n) for n in lengths])
        noise = reader(input_ids=torch.zeros(2, 400, dtype=torch.int64), attention_mask=mask)
        pieces = [(row - reader.embeddings.weight[0])[:n] for row, n in zip(noise, lengths, strict=True)]
    for piece, length in zip(pieces, lengths, strict=True):
        reach = ALPHA / (length * 16) ** 0.5
        assert 0.8 * reach < piece.abs().max() <= reach * (1 + 1e-5)


def test_nothing_is_added_in_evaluation(reader: Reader) -> None:
    ids = torch.arange(5)[None]
    assert torch.equal(reader.eval()(input_ids=ids, document_lengths=(5,)), reader.embeddings(ids))


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (BertConfig(), ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]),
        (GPT2Config(), ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
        (T5Config(), ["dropout_rate"]),
        (LlamaConfig(), ["attention_dropout"]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_every_rate_of_dropout_is_set(settings: AutoConfig, keys: list[str]) -> None:
    set_dropout(settings, 0.37)
    assert [getattr(settings, key) for key in keys] == [0.37] * len(keys)


def test_a_model_without_dropout_is_refused() -> None:
    settings = LlamaConfig()
    del settings.attention_dropout
    with pytest.raises(RequestError, match="no dropout"):
        set_dropout(settings, 0.1)
