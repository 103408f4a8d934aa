"""Images that run at a time where the outputs of all layers are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_PIXELS = 1 << 17


def at_a_time(shape: tuple[int, ...]) -> int:
    """Return how many images of this shape, (3, H, W), run at a time.

    All layers' outputs for them fit into memory, and computing them takes far longer than the calls themselves.
    """
    return max(1, _PIXELS // (shape[-1] * shape[-2]))


def parts(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield batches, float32 [n, 3, H, W], in parts of that many images."""
    for batch in batches:
        # INT8 kernels return this format, and tensors of different formats are slow to compare.
        batch = batch.contiguous(memory_format=torch.channels_last)
        yield from batch.split(at_a_time(batch.shape))
