"""Fixtures of the tests of attention."""

from tests.unit.model.attention.stubs import flash_attn, flex, gpu, torch_flash

__all__ = ["flash_attn", "flex", "gpu", "torch_flash"]
