"""An observer that records everything, and answers for whichever observer was chosen.

One pass over the calibration images thereby serves all of them. To torch it is an observer as any other: torch's own
formula makes scale and zero point from the range that the solver finds, and convert reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from qexp.config import Observer, Scheme
from qexp.quantize.grid import Grid
from qexp.quantize.ranges import solver
from qexp.quantize.statistics import Histogram, TensorStats, codes, counted, merge

# Enough that neither side waits for the other; each holds a copy of one activation.
_WAITING = 4


def destination(observer: Any) -> tuple[Grid, Scheme]:
    """The integers that an observer of torch's kind maps a range onto, and how."""
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return Grid(observer.quant_min, observer.quant_max), Scheme.symmetric if symmetric else Scheme.asymmetric


class Counting:
    """One thread that counts what the forward pass hands over while that goes on.

    Where it falls behind, the caller counts by itself: memory doesn't grow with the number of images.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._room = BoundedSemaphore(_WAITING)
        self._adding = Lock()
        self._failures: list[BaseException] = []

    def count(self, histogram: Histogram, values: Tensor) -> None:
        if self._room.acquire(blocking=False):
            self._thread.submit(self._count, histogram, values).add_done_callback(self._done)
        else:
            self._count(histogram, values)

    def finish(self) -> None:
        """Wait until all is counted; raises what kept any of it from being counted."""
        self._thread.shutdown()
        if self._failures:
            raise self._failures[0]

    def _count(self, histogram: Histogram, values: Tensor) -> None:
        found = counted(values)
        with self._adding:
            histogram.add(found)

    def _done(self, future: Future[None]) -> None:
        self._room.release()
        failure = future.exception()
        if failure is not None:
            self._failures.append(failure)


class _Ranges(dict[Grid, tuple[float, float]]):
    """By grid; shared by all copies of a recorder, which models are made of, as long as they saw the same."""

    def __deepcopy__(self, memo: object) -> _Ranges:
        return self


class Recorder(UniformQuantizationObserverBase):
    """Stands for the activation observer `observer`; keywords as for any of torch's (dtype, qscheme, quant_min, …)."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self, observer: Observer, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.observer = observer
        self.counting: Counting | None = None
        self.register_buffer("min_val", torch.tensor(math.inf))
        self.register_buffer("max_val", torch.tensor(-math.inf))
        self._closed: TensorStats | None = None
        self._open: tuple[list[float], list[float], Histogram] = ([], [], Histogram())
        self._ranges = _Ranges()

    def forward(self, x_orig: Tensor) -> Tensor:
        if x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach().to(torch.float32)
        low, high = torch.aminmax(x)
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        minima, maxima, histogram = self._open
        minima.append(float(low))
        maxima.append(float(high))
        # Codes are a copy: the tensor itself may be changed in place by the next layer before it is counted.
        if self.counting is None:
            histogram.add(counted(codes(x)))
        else:
            self.counting.count(histogram, codes(x))
        self._ranges = _Ranges()
        return x_orig

    @property
    def stats(self) -> TensorStats | None:
        """All that was seen so far; None before anything was. Not to be asked while `counting`."""
        minima, maxima, histogram = self._open
        if minima:
            found = TensorStats(
                torch.tensor(minima).numpy(), torch.tensor(maxima).numpy(), *histogram.sparse()
            )  # fmt: skip
            self._closed = found if self._closed is None else merge(self._closed, found)
            self._open = ([], [], Histogram())
        return self._closed

    def resume(self, stats: TensorStats) -> None:
        """Be as if it had seen what `stats` are of, and nothing else."""
        self._closed, self._open, self._ranges = stats, ([], [], Histogram()), _Ranges()
        self.min_val.fill_(stats.low)
        self.max_val.fill_(stats.high)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        stats = self.stats
        if stats is None:
            return self._calculate_qparams(self.min_val, self.max_val)
        grid, scheme = destination(self)  # which may have been narrowed since calibration
        if grid not in self._ranges:
            self._ranges[grid] = solver(self.observer)(stats, grid, scheme)
        low, high = self._ranges[grid]
        return self._calculate_qparams(torch.tensor(low), torch.tensor(high))


@contextmanager
def counting(observers: Iterable[Any]) -> Iterator[None]:
    """While this lasts, recorders among the observers count on a thread of their own; afterwards all is counted."""
    recorders = {id(observer): observer for observer in observers if isinstance(observer, Recorder)}.values()
    shared = Counting()
    for recorder in recorders:
        recorder.counting = shared
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.counting = None
        shared.finish()
