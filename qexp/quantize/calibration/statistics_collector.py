"""The collector of one tensor's statistics, batch by batch: extremes, and a histogram of its values' leading bits.

Calibration should cost little more than the forward pass itself. So a small tensor is only copied, and collected later
with others, and each value is counted by operators that torch runs fast and on all of its threads.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from qexp.quantize.calibration.tensor_statistics import SHIFT, TensorStats

_PORTION = 1 << 18  # values that are counted at once
_WAITING = 8  # small tensors collected at once, at most: more would take memory and save no time
_CODES = 1 << (32 - SHIFT)  # the number of codes; a code is a value's leading bits as an unsigned number
_NEGATIVE = _CODES // 2  # codes from here on belong to negative values

_ROWS = 4  # rows of counters, at most
# Not torch.ones, which would start torch's threads: jobs are forked from a process that has imported this module.
_ONES = torch.from_numpy(np.ones(_PORTION, np.int32))
_FULL = (1 << 31) // _PORTION - 1  # portions after which an int32 counter might be full

# Counter i counts code i + 1. Zeros are about half of a ReLU's output. On a single counter each increment would wait
# for the previous one, so zeros are spread over the last 16 counters, which would be those of NaN, and summed when
# read.
_OF_ZERO = 16
_IN_TURN = torch.from_numpy(_CODES - 1 - np.arange(4096, dtype=np.int32) % _OF_ZERO)


class Histogram:
    """Counters of how often each code occurred.

    torch's scatter_add_ uses one thread for each row of counters, so values are distributed over a few rows. Its
    documentation asks for int64 indices, but it accepts int32, which saves a conversion.
    """

    def __init__(self) -> None:
        rows = min(torch.get_num_threads(), _ROWS)
        # Mapped memory: counters that are never written to take no memory.
        memory = mmap.mmap(-1, 4 * rows * _CODES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._counters = torch.frombuffer(memory, dtype=torch.int32).view(rows, _CODES)
        self._portions = 0
        self._before: np.ndarray | None = None

    def add(self, values: Tensor) -> None:
        """Count values, float32 [n], contiguous."""
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
        """Return keys and counts, as in TensorStats. low, high: extremes of all values, to read fewer counters."""
        positive = self._counted(0, _leading_bits(max(0.0, high)))
        negative = self._counted(_NEGATIVE - 1, _NEGATIVE + _leading_bits(min(0.0, low)))[::-1]
        zeros = self._counted(_CODES - _OF_ZERO, _CODES).sum(keepdims=True)
        counts = np.concatenate([negative, zeros, positive], dtype=np.int64)
        used = np.flatnonzero(counts != 0)
        return (used - len(negative)).astype(np.int32), counts[used]


def _leading_bits(value: float) -> int:
    """Return the leading bits of its magnitude, as a number."""
    return int(np.float32(abs(value)).view(np.int32)) >> SHIFT


class StatisticsCollector:
    """Collects the statistics of one tensor over batches.

    Batches of small tensors wait, at most eight and a megabyte of them, to be collected together.
    """

    def __init__(self) -> None:
        self._minima: list[float] = []
        self._maxima: list[float] = []
        self._times: list[int] = []  # how many batches each counts as
        self._waiting: Tensor | None = None  # float32 [tensors, values]: tensors of one size
        self._filled = 0
        self._histogram: Histogram | None = None

    def __bool__(self) -> bool:
        return bool(self._times)

    def add(self, values: Tensor) -> None:
        """Add a batch, float32 of any shape but not empty; the tensor may be overwritten afterwards."""
        self._times.append(1)
        one = values.reshape(1, -1)
        if self._waiting is not None and self._waiting.shape[1] != one.shape[1]:
            self._collect_waiting()
            self._waiting = None
        if one.shape[1] > _PORTION // 2:
            self._collect(one)
            return
        if self._waiting is None:
            with torch.inference_mode(False):  # inference tensors can't be changed outside of inference mode
                self._waiting = torch.empty(min(_WAITING, _PORTION // one.shape[1]), one.shape[1])
        self._waiting[self._filled].copy_(one[0])
        self._filled += 1
        if self._filled == len(self._waiting):
            self._collect_waiting()

    def again(self) -> None:
        """Count the last batch once more, but not its values."""
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
        """True if all values are finite."""
        self._collect_waiting()
        return bool(np.isfinite(self._minima).all() and np.isfinite(self._maxima).all())

    def stats(self) -> TensorStats:
        """Return the statistics of all batches, at least one. Raises ValueError if a value was NaN or infinite."""
        self._collect_waiting()
        assert self._histogram is not None
        minima, maxima = (np.repeat(np.array(ends, np.float32), self._times) for ends in (self._minima, self._maxima))
        return TensorStats(minima, maxima, *self._histogram.sparse(min(self._minima), max(self._maxima)))


def statistics(values: Tensor) -> TensorStats:
    """Return the statistics of one whole tensor, float32 with at least one value."""
    collector = StatisticsCollector()
    collector.add(values)
    return collector.stats()
