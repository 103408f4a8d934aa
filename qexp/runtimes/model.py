"""What `load` of every runtime gives back: a callable that refuses to run under another engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def agree(
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    images: Tensor,
    batch_size: int,
    precision: str,
) -> float:
    """Largest difference of two variants' logits, as a share of the largest; INT8's must be equal bit for bit.

    images: float32 [n, 3, H, W]; precision: "fp32" or "int8". Raises RunError where the two don't agree. Call it with
    torch's engine set.
    """
    largest, difference, equal = 0.0, 0.0, True
    for batch in images.split(batch_size):
        expected, actual = first(batch), second(batch)
        equal = equal and torch.equal(expected, actual)
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - actual).abs().max()))
    relative = difference / largest if largest else difference
    if precision == "int8" and not equal:
        raise RunError(
            f"two runtimes of the same INT8 model differ by {relative:.2g} of the largest logit: they must be equal"
        )
    if not relative <= FP32_TOLERANCE:
        raise RunError(
            f"two runtimes of the same FP32 model differ by {relative:.2g} of the largest logit: {FP32_TOLERANCE:g} is "
            "allowed"
        )
    return relative
