"""Everything that can be known to be wrong before a worker starts, all of it at once and without torch.

The schema knows what a key is; this module knows what keys mean together and what they name: files, folders, an
existing run. Nothing is silently ignored: a key that the user set and that nothing would read is an error.
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
    """Every problem of a valid configuration; empty if there is none.

    Args:
        config: what was composed.
        set_keys: dotted keys that the user set, with their origins if it is a mapping.
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
