"""Settings that may be shown: without shell lines, seeds of privacy, and values that look like secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.run import RunConfig

HIDDEN = "[hidden]"
# setup and sbatch lines may contain secrets, and the noise seed of differential privacy is one
NEVER_SHOWN: Mapping[str, set[str]] = {"launch": {"setup", "sbatch"}, "privacy": {"noise_seed"}}


def shown_settings(config: RunConfig, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Return the configuration as JSON types without what is never shown; see `hide_secrets`."""
    shown: dict[str, Any] = hide_secrets(
        config.model_dump(mode="json", exclude={group: set(keys) for group, keys in NEVER_SHOWN.items()}), secrets
    )
    return shown


def hide_secrets(value: Any, secrets: Sequence[str] = ()) -> Any:
    """Replace secrets in nested data: values whose key names a secret, and parts of strings that look like one.

    Args:
        value: Mappings, sequences and plain values.
        secrets: Texts that are replaced wherever they occur, such as API keys.
    """
    if isinstance(value, Mapping):
        return {k: HIDDEN if _names_secret(str(k)) and v else hide_secrets(v, secrets) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in filter(None, secrets):
            value = value.replace(secret, HIDDEN)
        value = re.sub(r"(?i)\b(\w*(?:token|key|secret|passw(?:or)?d|signature)\w*=)[^\s&;'\"]+", rf"\1{HIDDEN}", value)
        return re.sub(r"://[^/\s@]+@", f"://{HIDDEN}@", value)
    return value


def _names_secret(key: str) -> bool:
    return re.search(r"(?i)(^|[_-])(api_?key|token|secret|passw(or)?d|credentials?)$", key) is not None
