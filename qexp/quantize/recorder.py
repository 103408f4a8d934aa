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
# Whatever is counted, a megabyte or two of counters are gone through: small tensors are counted some batches at a time.
_WORTH_COUNTING = 1 << 17


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

    def count(self, histogram: Histogram, parts: list[Tensor]) -> None:
        if self._room.acquire(blocking=False):
            self._thread.submit(self._count, histogram, parts).add_done_callback(self._done)
        else:
            self._count(histogram, parts)

    def finish(self) -> None:
        """Wait until all is counted; raises what kept any of it from being counted."""
        self._thread.shutdown()
        if self._failures:
            raise self._failures[0]

    def _count(self, histogram: Histogram, parts: list[Tensor]) -> None:
        found = counted(parts)
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


class _Open:
    """What was seen since statistics were last asked for; parts: codes that are not counted yet."""

    def __init__(self) -> None:
        self.minima: list[float] = []
        self.maxima: list[float] = []
        self.parts: list[Tensor] = []
        self.histogram = Histogram()
        self.finite = True


class Recorder(UniformQuantizationObserverBase):
    """Stands for the activation observer `observer`; keywords as for any of torch's (dtype, qscheme, quant_min, …)."""

    def __init__(self, observer: Observer, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.observer = observer
        self.counting: Counting | None = None
        self._closed: TensorStats | None = None
        self._open = _Open()
        self._ranges = _Ranges()

    def forward(self, x_orig: Tensor) -> Tensor:
        if x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach().to(torch.float32)
        low, high = (float(end) for end in torch.aminmax(x))
        seen = self._open
        seen.minima.append(low)
        seen.maxima.append(high)
        seen.finite = seen.finite and math.isfinite(low) and math.isfinite(high)
        # Codes are a copy: the tensor itself may be changed in place by the next layer before it is counted.
        seen.parts.append(codes(x))
        if sum(map(len, seen.parts)) >= _WORTH_COUNTING:
            self._count()
        if self._ranges:
            self._ranges = _Ranges()
        return x_orig

    def _count(self) -> None:
        parts, self._open.parts = self._open.parts, []
        if self.counting is None:
            self._open.histogram.add(counted(parts))
        else:
            self.counting.count(self._open.histogram, parts)

    @property
    def stats(self) -> TensorStats | None:
        """All that was seen so far; None before anything was. Not to be asked while `counting`."""
        seen = self._open
        if seen.parts:
            self._count()
        if seen.minima:
            minima, maxima = (torch.tensor(ends).numpy() for ends in (seen.minima, seen.maxima))
            found = TensorStats(minima, maxima, *seen.histogram.sparse())
            self._closed = found if self._closed is None else merge(self._closed, found)
            self._open = _Open()
        return self._closed

    @property
    def fed(self) -> bool:
        """Whether it has seen anything."""
        return self._closed is not None or bool(self._open.minima)

    @property
    def finite(self) -> bool:
        """Whether all that it has seen is finite; statistics can't be asked for where it isn't."""
        return self._open.finite

    def resume(self, stats: TensorStats) -> None:
        """Be as if it had seen what `stats` are of, and nothing else."""
        self._closed, self._open, self._ranges = stats, _Open(), _Ranges()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        stats = self.stats
        if stats is None:
            return self._calculate_qparams(torch.tensor(math.inf), torch.tensor(-math.inf))
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
