"""Defaults that depend on other keys."""

from __future__ import annotations

from dist_ft.launch.composition.compose import compose


def test_qlora_means_nf4_unless_told_otherwise() -> None:
    assert compose(["method=qlora"]).config.model.quantization == "nf4"
    assert compose(["method=qlora", "model.quantization=int8"]).config.model.quantization == "int8"
    assert compose(["method=lora"]).config.model.quantization == "none"
