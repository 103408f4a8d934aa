"""Statistics of a tensor from calibration, from which the range of every observer can be found afterwards.

The histogram is over the leading bits of the floats themselves, so no range need be known beforehand, and the counts of
two passes add up to those of a single one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHIFT = 14  # bits of a float32 that are dropped: sign, exponent and 9 bits of mantissa stay


@dataclass(frozen=True, eq=False)
class Bins:
    """A histogram: counts, int64 [n], of values from lower to upper, float64 [n]; ascending, without empty bins."""

    lower: np.ndarray
    upper: np.ndarray
    counts: np.ndarray

    def mirrored(self) -> Bins:
        """Return the histogram of the negated values."""
        return Bins(-self.upper[::-1], -self.lower[::-1], self.counts[::-1])


@dataclass(frozen=True, eq=False)
class TensorStats:
    """Statistics of all values of a tensor that calibration saw, in batches.

    minima, maxima: extremes of each batch, float32 [batches]; keys, counts: bins of the fine histogram, int32 [bins],
    in ascending order of value, and the number of values in each, int64 [bins]. A bin is 1/512 of its power of two
    wide: 0.1 to 0.2% of the values in it. The arrays are read-only. Raises ValueError if a value was NaN or infinite.
    """

    minima: np.ndarray
    maxima: np.ndarray
    keys: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        for array in (self.minima, self.maxima, self.keys, self.counts):
            array.flags.writeable = False
        if not (np.isfinite(self.minima).all() and np.isfinite(self.maxima).all()):
            raise ValueError("a tensor that holds NaN or infinity has no statistics")

    def __deepcopy__(self, memo: object) -> TensorStats:
        return self  # it can't be changed, and models are copied often

    @cached_property
    def count(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def low(self) -> float:
        return float(self.minima.min())

    @cached_property
    def high(self) -> float:
        return float(self.maxima.max())

    @cached_property
    def bins(self) -> Bins:
        """The fine histogram; its outermost bins end where the values do."""
        magnitudes = np.where(self.keys < 0, -self.keys - 1, self.keys)
        near, far = _edge(magnitudes), _edge(magnitudes + 1)
        lower, upper = np.where(self.keys < 0, -far, near), np.where(self.keys < 0, -near, far)
        return Bins(lower.clip(self.low, self.high), upper.clip(self.low, self.high), self.counts)

    @cached_property
    def magnitudes(self) -> Bins:
        """The fine histogram of the absolute values."""
        folded = np.where(self.keys < 0, -self.keys - 1, self.keys)
        keys, where = np.unique(folded, return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, where, self.counts)
        ends = max(self.low, -self.high, 0.0), max(-self.low, self.high)
        return Bins(_edge(keys).clip(*ends), _edge(keys + 1).clip(*ends), counts)


def _edge(magnitude: np.ndarray) -> np.ndarray:
    """Return the lower edges of the bins of these leading bits, float64; infinity after the last finite bin."""
    edge: np.ndarray = (magnitude.astype(np.int32) << SHIFT).view(np.float32).astype(np.float64)
    return edge


def merge(first: TensorStats, second: TensorStats) -> TensorStats:
    """Return the statistics of all batches of `first`, then `second`: the same as if one pass had seen them all."""
    keys, where = np.unique(np.concatenate([first.keys, second.keys]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, where, np.concatenate([first.counts, second.counts]))
    return TensorStats(
        np.concatenate([first.minima, second.minima]), np.concatenate([first.maxima, second.maxima]), keys, counts
    )
