"""Random masking of tokens as a pure function of (seed, sample, draw), independent of batches, ranks and resuming.

Source: Devlin et al. 2019, "BERT", section 3.1: of the selected tokens, 80% are replaced with the mask token, 10% are
replaced with a random token, and 10% are left unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MASKED_SHARE, REPLACED_SHARE = 0.8, 0.1
_MASKS = 1  # word of the Philox counter that separates this random stream from those of data/order/order.py


@dataclass(frozen=True)
class Masks:
    """Masking of a sample; indices count only the tokens that may be masked."""

    chosen: np.ndarray  # [n] int64: indices of the tokens to predict, in ascending order
    masked: np.ndarray  # [n] bool: replaced with the mask token
    replaced: np.ndarray  # [n] bool: replaced with a random token
    words: np.ndarray  # [n] uint64: random numbers from which the random tokens are derived


def share_of(count: int, share: float) -> int:
    """Return `count * share` rounded to the nearest integer, but at least 1 unless `count` is 0."""
    return max(1, int(np.floor(count * share + 0.5))) if count else 0


def draw_masks(units: np.ndarray, share: float, key: tuple[int, int, int]) -> Masks:
    """Select the tokens to predict and how each of them is masked.

    Exactly round(share * units) units are selected, but at least one. The random numbers come from Philox, because
    NumPy guarantees that its stream does not change between versions.

    Args:
        units: `[tokens]` int64, zero-based unit of each token: the token itself or, for whole-word masking, its word.
            The tokens of a unit are selected together, but each is masked, replaced or left unchanged independently.
        share: Fraction of the units to select.
        key: Seed, index of the sample in the split, and number of times that the sample has been used before.
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
