"""BitFit trains every bias and nothing else."""

from __future__ import annotations

import pytest

from dist_ft.config.method import BitfitConfig
from dist_ft.errors import RequestError
from dist_ft.method.bitfit import Bitfit
from dist_ft.model.anatomy import find_anatomy
from dist_ft.testing import tiny
from tests.samples import trainable_names


def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    model = tiny.build("gpt2")
    names = trainable_names(Bitfit(BitfitConfig(name="bitfit")).apply(find_anatomy(model)))
    # c_attn, attn.c_proj, c_fc, mlp.c_proj, ln_1, ln_2 of each block, and ln_f
    assert len(names) == 2 * 6 + 1 and all(name.endswith(".bias") for name in names)
    assert {name for name, _ in model.named_parameters() if name.endswith("bias")} == names


def test_bitfit_of_a_model_without_biases_is_an_error() -> None:
    with pytest.raises(RequestError, match="LlamaForCausalLM has no biases") as caught:
        Bitfit(BitfitConfig(name="bitfit")).apply(find_anatomy(tiny.build("llama")))
    assert "ln_tuning" in str(caught.value)
