"""Full fine-tuning trains every parameter."""

from __future__ import annotations

from dist_ft.config.method import FullConfig
from dist_ft.method.full import Full
from dist_ft.model.anatomy import find_anatomy
from dist_ft.testing import tiny
from tests.samples import trainable_names


def test_full_trains_everything() -> None:
    model = Full(FullConfig(name="full")).apply(find_anatomy(tiny.build("llama").requires_grad_(False)))
    assert trainable_names(model) == {name for name, _ in model.named_parameters()}
