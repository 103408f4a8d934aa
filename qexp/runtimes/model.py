"""What `load` of every runtime gives back: a callable that refuses to run under another engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qexp.config import Engine
from qexp.errors import RunError
from qexp.quantize import require

FP32_TOLERANCE = 1e-4
"""How far two runtimes' FP32 logits may be apart, as a share of the largest logit."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model read back from disk: float32 [n, 3, H, W] to float32 [n, classes], for any n.

    engine: what an INT8 model was converted for (None: FP32); calling it under another raises RunError.
    """

    module: nn.Module
    engine: Engine | None
    channels_last: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        if self.engine is not None:
            require(self.engine)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits: Tensor = self.module(images)
        return logits


def agree(expected: np.ndarray, actual: np.ndarray, precision: str) -> float:
    """Largest difference of the same images' logits, as a share of the largest; INT8's must be equal bit for bit.

    expected, actual: float32 [n, classes] of two variants of one model, computed in batches of one size; precision:
    "fp32" or "int8". Raises RunError where the two don't agree.
    """
    largest, difference = float(np.abs(expected).max()), float(np.abs(expected - actual).max())
    relative = difference / largest if largest else difference
    if precision == "int8" and not np.array_equal(expected, actual):
        raise RunError(
            f"two runtimes of the same INT8 model differ by {relative:.2g} of the largest logit: they must be equal."
        )
    if not relative <= FP32_TOLERANCE:
        raise RunError(
            f"two runtimes of the same FP32 model differ by {relative:.2g} of the largest logit: {FP32_TOLERANCE:g} is "
            "allowed."
        )
    return relative
