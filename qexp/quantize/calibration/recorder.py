"""A recorder of the statistics from which every observer finds its range: one calibration pass serves all of them.

It takes tensors and returns ranges, and doesn't depend on torch.ao.
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
    """Solved ranges, shared by all copies of a recorder (models are copied often) until one sees more."""

    def __deepcopy__(self, memo: object) -> _Ranges:
        return self


class Recorder:
    """Records one tensor's statistics, and solves for the range that `observer` quantizes."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._closed: TensorStats | None = None
        self._open = StatisticsCollector()
        self._ranges = _Ranges()

    def add(self, values: Tensor) -> None:
        """Record a batch, of any shape but not empty."""
        self._open.add(values.detach().to(torch.float32))
        if self._ranges:
            self._ranges = _Ranges()

    def again(self) -> None:
        """Count the last batch once more, but not its values."""
        self._open.again()

    @property
    def stats(self) -> TensorStats | None:
        """The statistics of all batches so far; None before the first."""
        if self._open:
            found = self._open.stats()
            self._closed = found if self._closed is None else merge(self._closed, found)
            self._open = StatisticsCollector()
        return self._closed

    @property
    def fed(self) -> bool:
        """True if it has seen any batch."""
        return self._closed is not None or self.is_open

    @property
    def is_open(self) -> bool:
        """True if it has seen a batch since statistics were last computed or resumed."""
        return bool(self._open)

    @property
    def finite(self) -> bool:
        """True if all values are finite; `stats` and `range` raise ValueError if not."""
        return self._open.finite

    def another(self) -> Recorder:
        """Return a recorder for the same observer that has seen nothing."""
        return Recorder(copy.deepcopy(self.observer))

    def resume(self, stats: TensorStats) -> None:
        """Replace everything recorded by `stats`."""
        self._closed, self._open, self._ranges = stats, StatisticsCollector(), _Ranges()

    def range(self, grid: Grid, scheme: Scheme) -> tuple[float, float]:
        """Return the ends of the range that is mapped onto `grid`. Raises ValueError if nothing was seen."""
        stats = self.stats
        if stats is None:
            raise ValueError("a tensor that was never seen has no range")
        if (grid, scheme) not in self._ranges:
            self._ranges[grid, scheme] = solver(self.observer)(stats, grid, scheme)
        return self._ranges[grid, scheme]
