"""Observers around a `Recorder`: what those of torch.ao's and of torchao's interface have in common."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, Self

import torch
from torch import Tensor

from qexp.config.schema import Observer, Scheme
from qexp.quantize.calibration.grid import QUANT_MAX, Grid
from qexp.quantize.calibration.recorder import Recorder


def destination(observer: Any) -> tuple[Grid, Scheme]:
    """Return the grid that an observer of torch's interface maps a range onto, and the scheme."""
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return Grid(observer.quant_min, observer.quant_max), Scheme.symmetric if symmetric else Scheme.asymmetric


class Recording:
    """A mixin for observers of torch.ao's and torchao's interface, to the activation observer `observer`; keywords are
    theirs (dtype, qscheme, quant_min, …).

    Their formula computes scale and zero point from the range that the recorder finds, and `convert` reads them.

    executed_quant_max: the largest code that kernels let through; it exceeds quant_max where a guard reduces the range.
    in_sequence: True for an observer inside one of torch's fused modules (an `nn.Sequential`), which calls it twice for
    each tensor. A moving average then counts two batches, as torch's own observers do; values are counted once.
    """

    def __init__(self, observer: Observer, executed_quant_max: int = QUANT_MAX, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.recorder, self.executed_quant_max = Recorder(observer), executed_quant_max
        self.in_sequence = False
        self._latest: weakref.ref[Tensor] | None = None

    def forward(self, x_orig: Tensor) -> Tensor:
        if x_orig.numel() == 0:
            return x_orig
        if self.in_sequence:
            again = self._latest is not None and self._latest() is x_orig and self.recorder.is_open
            self._latest = None if again else weakref.ref(x_orig)
            if again:
                self.recorder.again()
                return x_orig
        self.recorder.add(x_orig)
        return x_orig

    def another(self) -> Self:
        """Return an observer of the same kind that has seen nothing."""
        other = copy.deepcopy(self)
        other.recorder, other._latest = self.recorder.another(), None
        return other

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        # The grid may have been reduced since calibration.
        low, high = self.recorder.range(*destination(self)) if self.recorder.fed else (math.inf, -math.inf)
        found: tuple[Tensor, Tensor] = self._calculate_qparams(torch.tensor(low), torch.tensor(high))  # type: ignore[attr-defined]
        return found
