"""All checks of a configuration before a worker is started; reports every problem at once and needs no torch.

The schema validates single keys. The checks cover combinations of keys and what keys refer to: files, folders, an
existing run. Nothing is silently ignored: setting a key that has no effect is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..config.run import RunConfig
from ..errors import Problem
from ..privacy.rules import privacy_problems
from .combinations import length_problems, method_problems, mixture_problems, reference_problems, token_problems
from .data import augment_problems, chat_template_problems, choice_problems, data_problems, set_problems
from .keys import unread_problems
from .model import model_problems
from .run_folder import run_problems


def check(config: RunConfig, set_keys: Mapping[str, str] | Collection[str] = ()) -> list[Problem]:
    """Return every problem of a configuration that matches the schema.

    Args:
        config: Composed configuration.
        set_keys: Dotted keys that the user set; a mapping also gives the origin of each key.
    """
    origins = dict(set_keys) if isinstance(set_keys, Mapping) else dict.fromkeys(set_keys, "")
    return [
        *unread_problems(config, origins),
        *mixture_problems(config, origins),
        *length_problems(config, origins),
        *method_problems(config, origins),
        *token_problems(config, origins),
        *reference_problems(config, origins),
        *set_problems(config),
        *choice_problems(config),
        *augment_problems(config),
        *model_problems(config.model),
        *data_problems(config),
        *chat_template_problems(config),
        *run_problems(config),
        *privacy_problems(config),
    ]
