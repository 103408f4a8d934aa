"""A recorder as torch.ao sees it: an observer as any other."""

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
from qexp.quantize.calibration.recorder import Recorder


def destination(observer: Any) -> tuple[Grid, Scheme]:
    """The integers that an observer of torch's kind maps a range onto, and how."""
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return Grid(observer.quant_min, observer.quant_max), Scheme.symmetric if symmetric else Scheme.asymmetric


class RecordingObserver(UniformQuantizationObserverBase):
    """Stands for the activation observer `observer`; keywords as for any of torch's (dtype, qscheme, quant_min, …).

    torch's own formula makes scale and zero point from the range that the recorder finds, and convert reads them.

    highest: the largest code that is let through when the model is executed, beyond quant_max where that is a guard's.
    in_sequence: whether it is one of the parts that a fused module of torch's (an `nn.Sequential`) calls one after the
    other, and so gets each tensor twice. To a moving average that is two batches, as with torch's own observers; the
    values are counted once.
    """

    def __init__(self, observer: Observer, highest: int = HIGHEST, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.recorder, self.highest = Recorder(observer), highest
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

    def another(self) -> RecordingObserver:
        """An observer of the same kind that has seen nothing."""
        other = copy.deepcopy(self)
        other.recorder, other._latest = self.recorder.another(), None
        return other

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        # The grid may have been narrowed since calibration.
        low, high = self.recorder.range(*destination(self)) if self.recorder.fed else (math.inf, -math.inf)
        return self._calculate_qparams(torch.tensor(low), torch.tensor(high))
