"""Named random streams, determined by a purpose, a seed and a step."""

from __future__ import annotations

import hashlib

import numpy as np


def random_words(purpose: str, seed: int, step: int) -> np.random.Philox:
    """Return an independent Philox generator for each purpose, seed and step."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{step}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
