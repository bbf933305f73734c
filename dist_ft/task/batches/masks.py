"""Which tokens are hidden, and how: a pure function of (seed, sample, draw), whatever the batch, rank or restart.

Source: Devlin et al. 2019, "BERT", section 3.1: of the chosen tokens 80 % become the mask, 10 % a random token and 10 %
stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MASKED_SHARE, REPLACED_SHARE = 0.8, 0.1
_MASKS = 1  # a word of Philox's counter that keeps these numbers apart from those of data/order.py


@dataclass(frozen=True)
class Masks:
    """What happens to the tokens of a sample that may be hidden."""

    chosen: np.ndarray  # [n] int64: which of them are to be predicted, in order
    masked: np.ndarray  # [n] bool: become the mask
    replaced: np.ndarray  # [n] bool: become a random token
    words: np.ndarray  # [n] uint64: at random, from which such a token is taken


def share_of(count: int, share: float) -> int:
    """How many of `count` are chosen: the nearest whole number, but one at least where there is one to choose."""
    return max(1, int(np.floor(count * share + 0.5))) if count else 0


def draw_masks(units: np.ndarray, share: float, key: tuple[int, int, int]) -> Masks:
    """Choose tokens.

    Exactly round(share * units) units are chosen, one at least. Random words are those of Philox, the stream of which
    NumPy guarantees.

    Args:
        units: [tokens] int64, which unit each token belongs to, from 0: itself, or its word. All or none of a unit's
            tokens are chosen; mask, random token or neither is drawn for each token.
        share: of the units to choose.
        key: seed, index of the sample, and how often it was seen before.
    """
    seed, index, draw = key
    count = int(units.max()) + 1 if len(units) else 0
    generator = np.random.Philox(
        key=np.array([seed % 2**64, index], dtype=np.uint64), counter=np.array([0, draw, _MASKS, 0], dtype=np.uint64)
    )
    first = np.argsort(generator.random_raw(count), kind="stable")[: share_of(count, share)]
    chosen = np.flatnonzero(np.isin(units, first))
    points = (generator.random_raw(len(chosen)) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    masked = points < MASKED_SHARE
    replaced = ~masked & (points < MASKED_SHARE + REPLACED_SHARE)
    return Masks(chosen, masked, replaced, generator.random_raw(len(chosen)))
