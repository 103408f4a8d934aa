"""The choice of calibration images among the training images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qexp.config.schema import Calib, Sampling
from qexp.data.loading import Split
from qexp.errors import InputError


def draw(split: Split, calib: Calib) -> np.ndarray:
    """The indices of the calibration images in `split`, int64, in order: the first batch_size are the first batch.

    For one seed and sampling a smaller sample is the beginning of a larger one. `random`: a permutation; `stratified`:
    every beginning has classes as equally frequent as their sizes allow; `first`: the data set's order. batches=null
    takes all images. The last batch may be short; raises InputError where there is no image left for it.
    """
    available = len(split)
    wanted = available if calib.batches is None else calib.batches * calib.batch_size
    if wanted - available >= calib.batch_size:
        most = -(-available // calib.batch_size)
        raise InputError(
            f"calib.batches={calib.batches} asks for {wanted} images; {split.name} has {available} to calibrate with:"
            f" at most {most} batches of {calib.batch_size}, or calib.batches=null for all."
        )
    return _ORDERS[calib.sampling](split.labels, calib.seed)[:wanted].astype(np.int64)


def _order_random(labels: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(labels))


def _order_stratified(labels: np.ndarray, seed: int) -> np.ndarray:
    """In a random permutation, the first image of each class, then the second of each, and so on."""
    shuffled = _order_random(labels, seed)
    by_class = np.argsort(labels[shuffled], kind="stable")
    sizes = np.bincount(labels[shuffled])
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return shuffled[np.argsort(rank, kind="stable")]


def _order_first(labels: np.ndarray, seed: int) -> np.ndarray:
    return np.arange(len(labels))


_ORDERS: dict[Sampling, Callable[[np.ndarray, int], np.ndarray]] = {
    Sampling.random: _order_random,
    Sampling.stratified: _order_stratified,
    Sampling.first: _order_first,
}
