"""Training of a part of the model: its last blocks, parameters named by patterns, embeddings, or head."""

from __future__ import annotations

import re

from torch import nn

from ..config.method import FreezeConfig
from ..errors import Problem, RequestError
from ..model.reach import lies_in
from ..state import Anatomy
from .full import Full, freeze_idle, train_head


class Freeze(Full):
    """The method `freeze`. Exported as a full model, with the frozen weights unchanged."""

    config: FreezeConfig

    def __init__(self, config: FreezeConfig) -> None:
        super().__init__(config)

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Make the selected parameters trainable.

        Raises:
            RequestError: There are fewer blocks, a pattern matches nothing, or nothing would be trained.
        """
        config, model = self.config, anatomy.model
        self.keep_buffers(anatomy)
        blocks = anatomy.parts(anatomy.blocks)
        problems = [
            *_block_problems(config, len(blocks)),
            *_pattern_problems(config, anatomy),
            *_tie_problems(config, anatomy),
        ]
        if problems:
            raise RequestError(*problems)
        model.requires_grad_(False)
        for block in blocks[len(blocks) - config.num_layers :]:
            block.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if any(re.search(pattern, name) for pattern in config.trainable):
                parameter.requires_grad_(True)
        train_head(anatomy)
        if config.train_embeddings:
            _require_part(anatomy, anatomy.embeddings).requires_grad_(True)
        if config.train_head:
            _require_part(anatomy, anatomy.head).requires_grad_(True)
        freeze_idle(anatomy)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            way_out = "set method.num_layers=2, method.train_head=true, or patterns in method.trainable"
            raise RequestError.of(
                "method", "nothing would be trained: no layers, patterns, embeddings or head are selected", way_out
            )
        return model


def _block_problems(config: FreezeConfig, blocks: int) -> list[Problem]:
    if config.num_layers <= blocks:
        return []
    rule = f"{config.num_layers} layers are to be trained, but the model has {blocks}"
    return [Problem("method.num_layers", rule, f"set it to at most {blocks}, or method=full")]


def _pattern_problems(config: FreezeConfig, anatomy: Anatomy) -> list[Problem]:
    names = [name for name, _ in anatomy.model.named_parameters() if not lies_in(name, anatomy.idle)]
    problems = []
    for pattern in config.trainable:
        try:
            if any(re.search(pattern, name) for name in names):
                continue
            rule = f"{pattern!r} matches no parameter" + (" that a text reaches" if anatomy.idle else "")
        except re.error as error:
            rule = f"{pattern!r} is not a regular expression: {error}"
        problems.append(Problem("method.trainable", rule, f"parameter names are like {', '.join(names[:4])}, …"))
    return problems


def _require_part(anatomy: Anatomy, name: str | None) -> nn.Module:
    assert name is not None, "checked before"
    return anatomy.part(name)


def _tie_problems(config: FreezeConfig, anatomy: Anatomy) -> list[Problem]:
    if config.train_head and anatomy.head is None:
        return [Problem("method.train_head", "the model has no output head", "set it to false")]
    if not anatomy.tied or config.train_head == config.train_embeddings:
        return []
    rule = "input embeddings and head of this model are tied, but only one of them would be trained"
    return [Problem("method.train_head", rule, "set method.train_embeddings and method.train_head to the same value")]
