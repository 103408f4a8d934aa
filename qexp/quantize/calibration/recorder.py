"""A recorder of all that ranges are found from: one pass over the calibration images serves every observer.

Takes tensors and gives ranges; which framework they are for is not known here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from qexp.config.schema import Observer, Scheme
from qexp.quantize.calibration.grid import Grid
from qexp.quantize.calibration.ranges import solver
from qexp.quantize.calibration.statistics_collector import StatisticsCollector
from qexp.quantize.calibration.tensor_statistics import TensorStats, merge


class _Ranges(dict[tuple[Grid, Scheme], tuple[float, float]]):
    """Shared by all copies of a recorder, which models are made of, as long as they saw the same."""

    def __deepcopy__(self, memo: object) -> _Ranges:
        return self


class Recorder:
    """Records what is seen of one tensor, and answers for `observer` which range is quantized."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._closed: TensorStats | None = None
        self._open = StatisticsCollector()
        self._ranges = _Ranges()

    def add(self, values: Tensor) -> None:
        """A batch; of any shape, but not empty."""
        self._open.add(values.detach().to(torch.float32))
        if self._ranges:
            self._ranges = _Ranges()

    def again(self) -> None:
        """The last batch counts as another one, but its values don't."""
        self._open.again()

    @property
    def stats(self) -> TensorStats | None:
        """All that was seen so far; None before anything was."""
        if self._open:
            found = self._open.stats()
            self._closed = found if self._closed is None else merge(self._closed, found)
            self._open = StatisticsCollector()
        return self._closed

    @property
    def fed(self) -> bool:
        """Whether it has seen anything."""
        return self._closed is not None or self.is_open

    @property
    def is_open(self) -> bool:
        """Whether it has seen anything since statistics were last made or resumed."""
        return bool(self._open)

    @property
    def finite(self) -> bool:
        """Whether all that it has seen is finite; statistics can't be asked for where it isn't."""
        return self._open.finite

    def another(self) -> Recorder:
        """A recorder for the same observer that has seen nothing."""
        return Recorder(copy.deepcopy(self.observer))

    def resume(self, stats: TensorStats) -> None:
        """Be as if it had seen what `stats` are of, and nothing else."""
        self._closed, self._open, self._ranges = stats, StatisticsCollector(), _Ranges()

    def range(self, grid: Grid, scheme: Scheme) -> tuple[float, float]:
        """The ends of what is quantized onto `grid`. Raises ValueError where nothing was seen."""
        stats = self.stats
        if stats is None:
            raise ValueError("a tensor that was never seen has no range")
        if (grid, scheme) not in self._ranges:
            self._ranges[grid, scheme] = solver(self.observer)(stats, grid, scheme)
        return self._ranges[grid, scheme]
