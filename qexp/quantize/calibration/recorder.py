"""An observer that records everything, and answers for whichever observer was chosen.

One pass over the calibration images thereby serves all of them. To torch it is an observer as any other: torch's own
formula makes scale and zero point from the range that the solver finds, and convert reads them.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from qexp.config.schema import Observer, Scheme
from qexp.quantize.calibration.grid import HIGHEST, Grid
from qexp.quantize.calibration.histogram import Seen
from qexp.quantize.calibration.ranges import solver
from qexp.quantize.calibration.tensor_statistics import TensorStats, merge


def destination(observer: Any) -> tuple[Grid, Scheme]:
    """The integers that an observer of torch's kind maps a range onto, and how."""
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return Grid(observer.quant_min, observer.quant_max), Scheme.symmetric if symmetric else Scheme.asymmetric


class _Ranges(dict[Grid, tuple[float, float]]):
    """By grid; shared by all copies of a recorder, which models are made of, as long as they saw the same."""

    def __deepcopy__(self, memo: object) -> _Ranges:
        return self


class Recorder(UniformQuantizationObserverBase):
    """Stands for the activation observer `observer`; keywords as for any of torch's (dtype, qscheme, quant_min, …).

    highest: the largest code that is let through when the model is executed, beyond quant_max where that is a guard's.
    in_sequence: whether it is one of the parts that a fused module of torch's (an `nn.Sequential`) calls one after the
    other, and so gets each tensor twice. To a moving average that is two batches, as with torch's own observers; the
    values are counted once.
    """

    def __init__(self, observer: Observer, highest: int = HIGHEST, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.observer, self.highest = observer, highest
        self.in_sequence = False
        self._latest: weakref.ref[Tensor] | None = None
        self._closed: TensorStats | None = None
        self._open = Seen()
        self._ranges = _Ranges()

    def forward(self, x_orig: Tensor) -> Tensor:
        if x_orig.numel() == 0:
            return x_orig
        if self.in_sequence:
            again = self._latest is not None and self._latest() is x_orig and bool(self._open)
            self._latest = None if again else weakref.ref(x_orig)
            if again:
                self._open.again()
                return x_orig
        self._open.add(x_orig.detach().to(torch.float32))
        if self._ranges:
            self._ranges = _Ranges()
        return x_orig

    @property
    def stats(self) -> TensorStats | None:
        """All that was seen so far; None before anything was."""
        if self._open:
            found = self._open.stats()
            self._closed = found if self._closed is None else merge(self._closed, found)
            self._open = Seen()
        return self._closed

    @property
    def fed(self) -> bool:
        """Whether it has seen anything."""
        return self._closed is not None or bool(self._open)

    @property
    def finite(self) -> bool:
        """Whether all that it has seen is finite; statistics can't be asked for where it isn't."""
        return self._open.finite

    def another(self) -> Recorder:
        """A recorder of the same kind that has seen nothing."""
        other = copy.deepcopy(self)
        other._latest, other._closed, other._open, other._ranges = None, None, Seen(), _Ranges()
        return other

    def resume(self, stats: TensorStats) -> None:
        """Be as if it had seen what `stats` are of, and nothing else."""
        self._closed, self._open, self._ranges = stats, Seen(), _Ranges()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        stats = self.stats
        if stats is None:
            return self._calculate_qparams(torch.tensor(math.inf), torch.tensor(-math.inf))
        grid, scheme = destination(self)  # which may have been narrowed since calibration
        if grid not in self._ranges:
            self._ranges[grid] = solver(self.observer)(stats, grid, scheme)
        low, high = self._ranges[grid]
        return self._calculate_qparams(torch.tensor(low), torch.tensor(high))
