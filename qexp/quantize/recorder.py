"""An observer that records everything, and answers for whichever observer was chosen.

One pass over the calibration images thereby serves all of them. To torch it is an observer as any other: torch's own
formula makes scale and zero point from the range that the solver finds, and convert reads them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from qexp.config import Observer, Scheme
from qexp.quantize.grid import Grid
from qexp.quantize.ranges import solver
from qexp.quantize.statistics import Histogram, TensorStats, counted, leading_bits, merge

# Whatever is counted, a megabyte or two of counters are gone through, so small tensors are counted many batches at a
# time: up to 32 MB of all wait.
_WAITING = 1 << 23


def destination(observer: Any) -> tuple[Grid, Scheme]:
    """The integers that an observer of torch's kind maps a range onto, and how."""
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return Grid(observer.quant_min, observer.quant_max), Scheme.symmetric if symmetric else Scheme.asymmetric


class Counting:
    """Counts what the forward pass hands over, on all of torch's threads and whenever enough of it waits.

    Not beside the forward pass: a third thread on two cores would make its layers wait for each other.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        # torch counts on one thread, and each of these would start others for what little it does on several.
        self._pool = ThreadPoolExecutor(self._threads, initializer=partial(torch.set_num_threads, 1))
        self._waiting: dict[Histogram, list[Tensor]] = {}
        self._values = 0

    def add(self, histogram: Histogram, bits: Tensor) -> None:
        """bits: as `leading_bits` gives them."""
        self._waiting.setdefault(histogram, []).append(bits)
        self._values += len(bits)
        if self._values >= _WAITING:
            self._count(self._values // 2)

    def finish(self) -> None:
        """Count what waits; raises what kept any of it from being counted."""
        try:
            self._count(self._values)
        finally:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)  # which is what threads yet to come begin with

    def _count(self, values: int) -> None:
        """Count that many of the values that wait, or a few more: those of the tensors of which there are most."""
        largest_first = sorted(self._waiting, key=lambda one: sum(map(len, self._waiting[one])), reverse=True)
        left, portions = self._values - values, []
        for histogram in largest_first:
            if self._values <= left:
                break
            parts = self._waiting.pop(histogram)
            portions.append((histogram, parts))
            self._values -= sum(map(len, parts))
        for _ in self._pool.map(lambda portion: portion[0].add(counted(portion[1])), portions):
            pass


class _Ranges(dict[Grid, tuple[float, float]]):
    """By grid; shared by all copies of a recorder, which models are made of, as long as they saw the same."""

    def __deepcopy__(self, memo: object) -> _Ranges:
        return self


class _Open:
    """What was seen since statistics were last asked for."""

    def __init__(self) -> None:
        self.minima: list[float] = []
        self.maxima: list[float] = []
        self.histogram = Histogram()
        self.finite = True


class Recorder(UniformQuantizationObserverBase):
    """Stands for the activation observer `observer`; keywords as for any of torch's (dtype, qscheme, quant_min, …).

    in_sequence: whether it is one of the parts that a fused module of torch's (an `nn.Sequential`) calls one after the
    other, and so gets each tensor twice. To a moving average that is two batches, as with torch's own observers; the
    values are counted once.
    """

    def __init__(self, observer: Observer, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.observer = observer
        self.counting: Counting | None = None
        self.in_sequence = False
        self._latest: weakref.ref[Tensor] | None = None
        self._closed: TensorStats | None = None
        self._open = _Open()
        self._ranges = _Ranges()

    def forward(self, x_orig: Tensor) -> Tensor:
        if x_orig.numel() == 0:
            return x_orig
        seen = self._open
        if self.in_sequence:
            again = self._latest is not None and self._latest() is x_orig and bool(seen.minima)
            self._latest = None if again else weakref.ref(x_orig)
            if again:
                seen.minima.append(seen.minima[-1])
                seen.maxima.append(seen.maxima[-1])
                return x_orig
        x = x_orig.detach()
        if x.dtype is not torch.float32:
            x = x.to(torch.float32)
        low, high = (float(end) for end in torch.aminmax(x))
        seen.minima.append(low)
        seen.maxima.append(high)
        seen.finite = seen.finite and math.isfinite(low) and math.isfinite(high)
        # A copy: the tensor itself may be changed in place by the next layer before it is counted.
        bits = leading_bits(x)
        if self.counting is None:
            seen.histogram.add(counted([bits]))
        else:
            self.counting.add(seen.histogram, bits)
        if self._ranges:
            self._ranges = _Ranges()
        return x_orig

    @property
    def stats(self) -> TensorStats | None:
        """All that was seen so far; None before anything was. Not to be asked while `counting`."""
        seen = self._open
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
    """While this lasts, recorders among the observers count together, in large portions; afterwards all is counted."""
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
