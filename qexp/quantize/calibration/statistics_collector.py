"""Statistics of a tensor in the making, batch by batch: its ends, and how often its values had which leading bits.

Calibration is to cost little more than the forward pass itself, so what is done for each tensor is a copy, and what is
done for each value is what torch does fast and on all of its threads.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from qexp.quantize.calibration.tensor_statistics import SHIFT, TensorStats

_PORTION = 1 << 18  # values that are counted at once
_WAITING = 8  # small tensors that wait for that, at most: with more, memory grows for longer, and no time is saved
_CODES = 1 << (32 - SHIFT)  # how many there are: leading bits as an unsigned number
_NEGATIVE = _CODES // 2  # codes from here on are of negative values

_ROWS = 4  # of counters, at most
# Not torch's ones: that starts its threads, and jobs are forked from a process that has imported this.
_ONES = torch.from_numpy(np.ones(_PORTION, np.int32))
_FULL = (1 << 31) // _PORTION - 1  # portions after which a counter might be

# Counter i is that of code i + 1, and the last ones, which would be NaN's, are those of 0. That is half of what a ReLU
# gives, and with one counter each addition would wait for the one before: 16 take turns.
_OF_ZERO = 16
_IN_TURN = torch.from_numpy(_CODES - 1 - np.arange(4096, dtype=np.int32) % _OF_ZERO)


class Histogram:
    """How often each code came.

    torch adds on one thread for each row of counters. So there are a few rows, and values are dealt out to them. Its
    documentation asks for int64 indices, but int32 are taken as well, and need not be made first.
    """

    def __init__(self) -> None:
        rows = min(torch.get_num_threads(), _ROWS)
        # Counters that are never written to take no memory this way.
        memory = mmap.mmap(-1, 4 * rows * _CODES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._counters = torch.frombuffer(memory, dtype=torch.int32).view(rows, _CODES)
        self._portions = 0
        self._before: np.ndarray | None = None

    def add(self, values: Tensor) -> None:
        """float32 [n], contiguous."""
        for portion in values.view(torch.int32).split(_PORTION):
            places = portion.bitwise_right_shift(SHIFT).sub_(1).bitwise_and_(_CODES - 1)
            blocks = places[: len(places) // len(_IN_TURN) * len(_IN_TURN)].view(-1, len(_IN_TURN))
            torch.minimum(blocks, _IN_TURN, out=blocks)
            self._count(places)

    def _count(self, places: Tensor) -> None:
        rows = len(self._counters)
        dealt = len(places) // rows * rows
        self._counters.scatter_add_(1, places[:dealt].view(rows, -1), _ONES.expand(rows, -1))
        self._counters[0].scatter_add_(0, places[dealt:], _ONES)
        self._portions += 1
        if self._portions == _FULL:
            self._before = self._counted(0, _CODES).astype(np.int64)
            self._counters.zero_()
            self._portions = 0

    def _counted(self, start: int, stop: int) -> np.ndarray:
        counted: np.ndarray = self._counters[:, start:stop].sum(0, dtype=torch.int32).numpy()
        return counted if self._before is None else counted + self._before[start:stop]

    def sparse(self, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """keys and counts, as in TensorStats; low, high: the ends of all values, beyond which nothing need be read."""
        positive = self._counted(0, _leading_bits(max(0.0, high)))
        negative = self._counted(_NEGATIVE - 1, _NEGATIVE + _leading_bits(min(0.0, low)))[::-1]
        zeros = self._counted(_CODES - _OF_ZERO, _CODES).sum(keepdims=True)
        counts = np.concatenate([negative, zeros, positive], dtype=np.int64)
        used = np.flatnonzero(counts != 0)
        return (used - len(negative)).astype(np.int32), counts[used]


def _leading_bits(value: float) -> int:
    """Of its magnitude."""
    return int(np.float32(abs(value)).view(np.int32)) >> SHIFT


class StatisticsCollector:
    """What was seen of a tensor so far. Small ones wait, eight and a megabyte at most, to be looked at together."""

    def __init__(self) -> None:
        self._minima: list[float] = []
        self._maxima: list[float] = []
        self._times: list[int] = []  # how often each was seen
        self._waiting: Tensor | None = None  # float32 [tensors, values]: tensors of one size
        self._filled = 0
        self._histogram: Histogram | None = None

    def __bool__(self) -> bool:
        return bool(self._times)

    def add(self, values: Tensor) -> None:
        """float32, of any shape but not empty; they may change as soon as this returns."""
        self._times.append(1)
        one = values.reshape(1, -1)
        if self._waiting is not None and self._waiting.shape[1] != one.shape[1]:
            self._collect_waiting()
            self._waiting = None
        if one.shape[1] > _PORTION // 2:
            self._collect(one)
            return
        if self._waiting is None:
            with torch.inference_mode(False):  # what is made in it can't be changed outside
                self._waiting = torch.empty(min(_WAITING, _PORTION // one.shape[1]), one.shape[1])
        self._waiting[self._filled].copy_(one[0])
        self._filled += 1
        if self._filled == len(self._waiting):
            self._collect_waiting()

    def again(self) -> None:
        """The last tensor counts as a batch once more, but its values don't."""
        self._times[-1] += 1

    def _collect_waiting(self) -> None:
        if self._waiting is not None and self._filled:
            self._collect(self._waiting[: self._filled])
            self._filled = 0

    def _collect(self, tensors: Tensor) -> None:
        self._minima += tensors.amin(1).tolist()
        self._maxima += tensors.amax(1).tolist()
        if self._histogram is None:
            with torch.inference_mode(False):
                self._histogram = Histogram()
        self._histogram.add(tensors.view(-1))

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        self._collect_waiting()
        return bool(np.isfinite(self._minima).all() and np.isfinite(self._maxima).all())

    def stats(self) -> TensorStats:
        """Of one tensor or more. Raises ValueError where a value was NaN or infinite."""
        self._collect_waiting()
        assert self._histogram is not None
        minima, maxima = (np.repeat(np.array(ends, np.float32), self._times) for ends in (self._minima, self._maxima))
        return TensorStats(minima, maxima, *self._histogram.sparse(min(self._minima), max(self._maxima)))


def statistics(values: Tensor) -> TensorStats:
    """Of a tensor, float32 with one value or more, that is seen at once."""
    collector = StatisticsCollector()
    collector.add(values)
    return collector.stats()
