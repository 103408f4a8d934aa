"""From a model that was loaded back to its predictions on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.data import Split, normalise
from qexp.results import Predictions


def predict(
    model: Callable[[Tensor], Tensor],
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    title: str = "evaluating",
    indices: np.ndarray | None = None,
) -> Predictions:
    """Logits of every image of a split, or of `indices` (int64) of it, in this order.

    Every batch has `batch_size` images, the last one filled up with copies: the size of a batch can change FP32
    activations in their last bit, and with them INT8 logits. Call it with torch's engine set.
    """
    chosen = np.arange(len(split.labels)) if indices is None else indices
    if indices is None:
        split.pixels()  # decoded once for all, and memory-mapped from then on
    logits: list[np.ndarray] = []
    starts = range(0, len(chosen), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=None, leave=False):
        part = chosen[start : start + batch_size]
        filled = np.resize(part, batch_size)
        images = normalise(split.pixels(filled), mean, std)
        with torch.inference_mode():
            logits.append(model(images)[: len(part)].numpy().astype(np.float32))
    return Predictions(
        logits=np.concatenate(logits),
        labels=split.labels[chosen],
        image_ids=tuple(split.ids[i] for i in chosen),
    )
