"""Fingerprints tell tensors apart, and an account names the tensors that differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ft.errors import TrainingError
from dist_ft.export.account import Account, Fingerprint


def test_fingerprints_tell_tensors_apart() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(4, 4)
    same = Fingerprint.of(tensor)
    assert same.distance(Fingerprint.of(tensor.clone())) == 0
    assert same == Fingerprint.of(tensor.T.contiguous().T), "the memory layout must not matter"
    flipped = tensor.clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    for other in (flipped, tensor.T, tensor.bfloat16(), tensor.flatten()):
        assert same.distance(Fingerprint.of(other)) > 0
    assert Fingerprint.of(torch.zeros(())).shape == ()


def test_an_account_names_the_worst_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    account = Account()
    list(account.record(model.named_parameters()))
    account.check_loaded(model)
    model[0].weight.data *= 1.01
    model[1].weight.data *= 9
    with pytest.raises(TrainingError) as caught:
        account.check_loaded(model)
    assert [problem.where for problem in caught.value.problems] == ["1.weight", "0.weight"]
