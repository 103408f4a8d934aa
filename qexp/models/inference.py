"""Predictions of a loaded model on a split; logits that are NaN or infinite are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.data.loading import Split, normalise
from qexp.errors import NotFinite
from qexp.records import Predictions
from qexp.statistics import random_order
from qexp.system import machine_lock

Model = Callable[[Tensor], Tensor]
BLOCK_BATCHES = 32  # after each of which an evaluation can be stopped


def predict(
    model: Model,
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    title: str = "evaluating",
    indices: np.ndarray | None = None,
    copies: Sequence[Model] = (),
    shuffled: bool = False,
) -> Predictions:
    """Logits of every image of a split, or of `indices` (int64) of it, in this order.

    Every batch has `batch_size` images, the last one filled up with copies: the size of a batch can change FP32
    activations in their last bit, and with them INT8 logits. Call it with torch's engine set. copies: of the model,
    each for another batch at the same time; shuffled: see `blocks`. Raises NotFinite as `predictions` does.
    """
    chosen = np.arange(len(split.labels)) if indices is None else indices
    if indices is None:
        split.pixels()  # decoded once for all, and memory-mapped from then on

    def logits_of(one: Model, positions: np.ndarray) -> np.ndarray:
        images = normalise(split.pixels(np.resize(chosen[positions], batch_size)), mean, std)
        with torch.inference_mode():
            # Of a single image, a model that ends in squeeze() gives one row without saying so.
            logits: np.ndarray = one(images).reshape(batch_size, -1)[: len(positions)].numpy().astype(np.float32)
        return logits

    parts = blocks(logits_of, (model, *copies), len(chosen), batch_size, title, shuffled)
    positions, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    in_order = np.empty((len(chosen), logits.shape[1]), np.float32)
    in_order[positions] = logits
    return predictions(in_order, split, title, indices)


def blocks(
    logits_of: Callable[[Model, np.ndarray], np.ndarray],
    models: Sequence[Model],
    count: int,
    batch_size: int,
    title: str,
    shuffled: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits of `count` images, block by block: their positions among these, int64 [n], and float32 [n, classes]. A
    caller can stop after any block.

    logits_of: from a model and the positions of a batch, int64, to its logits; models: equal ones, each for another
    batch at the same time, on one thread. That is faster than several threads per layer, where each layer waits for the
    slowest thread. shuffled: in a random order, always the same, so that the first blocks are a random sample of the
    images; for models that give an image the same logits in any company.
    """
    order = random_order(count) if shuffled else np.arange(count)
    free: SimpleQueue[Model] = SimpleQueue()
    for one in models:
        free.put(one)

    @machine_lock.computing()
    def batch(start: int) -> np.ndarray:
        mine = free.get()
        try:
            return logits_of(mine, order[start : start + batch_size])
        finally:
            free.put(mine)

    starts = range(0, count, batch_size)
    with (
        _side_by_side(len(models)) as mapped,
        tqdm(mapped(batch, starts), desc=title, total=len(starts), unit="batch", disable=None, leave=False) as found,
    ):
        batches = iter(found)
        for start in range(0, count, BLOCK_BATCHES * batch_size):
            with machine_lock.released():  # each batch takes the machine's lock by itself, in whichever thread
                logits = np.concatenate(list(islice(batches, BLOCK_BATCHES)))
            yield order[start : start + len(logits)], logits


def predictions(logits: np.ndarray, split: Split, title: str, indices: np.ndarray | None = None) -> Predictions:
    """float32 logits [n, classes] of a split, or of `indices` (int64) of it, with labels and names of the images.

    title: what was computed, as `evaluating INT8`. Raises NotFinite that names the first image and says how many there
    are where a logit is NaN or infinite.
    """
    chosen = np.arange(len(split.labels)) if indices is None else indices
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise NotFinite(
            f"{title}: the model gives NaN or infinity as logits of {len(broken)} of {len(logits)} images, the first of"
            f" them {split.source.where(int(chosen[broken[0]]))}; mend the model (does it divide by zero there, or take"
            " a logarithm or a root?) or take the image out."
        )
    return Predictions(logits, split.labels[chosen], tuple(split.ids[i] for i in chosen))


@contextmanager
def _side_by_side(count: int) -> Iterator[Callable[..., Iterator[np.ndarray]]]:
    """`map` with `count` calls at a time, each on one torch thread; for a count of 1, on all threads."""
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # which is what threads yet to come begin with
