"""16-bit accumulators on plain tensors: which weights are paired, which pairs overflow, and the sums that result.

The order in which a kernel goes through a reduction determines the pairs of products that it adds in int16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.config.schema import Engine
from qexp.quantize.calibration.grid import QUANT_MAX

_INT16 = torch.iinfo(torch.int16)
_CHUNK = 1 << 19
"""Values that one step works on: 2 MB of float32 stay in a core's cache, which makes steps twice as fast."""


def run_length(order: Engine, shape: Sequence[int], groups: int) -> int:
    """Return the number of terms of a reduction after which pairing starts again.

    order: the engine whose kernels add up; shape: of the weights, [out, channels of a group, ...], or [out, features]
    of a linear layer. FBGEMM: PackAWithIm2Col and GenerateI8Depthwise pack four terms at a time, whatever they are.
    oneDNN: the convolution kernels (jit_uni_x8s8s32x) pad each tap's channels to a multiple of 4, and groups whose
    channels are no multiple of 4 run on an exact kernel; its matrix product halves a reduction of 257 to 767 terms
    (get_k_padd in gemm_driver.cpp; longer ones are cut into blocks of 384, which makes no difference).
    """
    out, channels, *taps = shape
    terms = channels * math.prod(taps)
    if order is Engine.qnnpack:
        return 1
    if order is not Engine.onednn:
        return terms
    if not taps:
        return -(-terms // 2) if 256 < terms < 768 else terms
    exact = groups > 1 and (channels % 4 or out // groups % 4)
    return 1 if exact else channels


def overflowing(pairs: Tensor, largest: Tensor | None = None) -> Tensor:
    """True for each pair of weights whose products can exceed int16, with activations of 0 to `largest`: bool [...].

    pairs: int16 [..., 2]; largest: int32 that broadcasts to it (None: 255). The extremes of a pair are the sums of its
    positive and of its negative products; with 255 only weights of one sign overflow, if their sum is beyond ±128.
    """
    if largest is None:
        return (pairs[..., 0] + pairs[..., 1]).abs() > 128
    products = pairs.to(torch.int32) * largest
    return (products.clamp(min=0).sum(-1) > _INT16.max) | (products.clamp(max=0).sum(-1) < _INT16.min)


def paired(values: Tensor, run: int) -> Tensor:
    """Pair neighbours within runs, padded with zeros: from [n, terms, ...] to [n, pairs, 2, ...]."""
    runs = _filled(values, 1, run).unflatten(1, (-1, run))
    return _filled(runs, 2, 2).flatten(1, 2).unflatten(1, (-1, 2))


def _filled(values: Tensor, dim: int, multiple: int) -> Tensor:
    shape = list(values.shape)
    shape[dim] = -shape[dim] % multiple
    return torch.cat([values, values.new_zeros(shape)], dim) if shape[dim] else values


def accumulators(rows: Tensor, pairs: Tensor, saturating: bool = True) -> Tensor:
    """Return sums of products, float64 [out, positions]; if `saturating`, each pair's sum is clamped to int16 first.

    rows: float32 [groups, pairs, 2, positions], integers of 0 to 255; pairs: int16 [out, pairs, 2]. All intermediate
    numbers are integers up to 2^53 (2^24 in float32), so nothing is rounded. Only pairs that can overflow with the
    largest activations of these rows are computed one by one.
    """
    groups, count, _, positions = rows.shape
    outputs_of_group = len(pairs) // groups
    dtype = torch.float32 if 2 * count * QUANT_MAX * 128 <= 1 << 24 else torch.float64
    weights = pairs.to(dtype).view(groups, outputs_of_group, 2 * count)
    sums = torch.bmm(weights, rows.to(dtype).view(groups, 2 * count, positions)).flatten(0, 1).double()
    if saturating:
        sums += lost(rows, pairs)
    return sums


def lost(rows: Tensor, pairs: Tensor) -> Tensor:
    """Return the difference that clamping each pair's sum to int16 makes to sums of products, float64 [out, positions].

    Arguments as of `accumulators`. Only pairs that can overflow with the largest activations are computed.
    """
    groups, count, _, positions = rows.shape
    outputs_of_group = len(pairs) // groups
    difference = torch.zeros(len(pairs), positions, dtype=torch.float64)
    largest = rows.amax(-1).to(torch.int32).repeat_interleave(outputs_of_group, dim=0)
    outputs, which = overflowing(pairs, largest).nonzero(as_tuple=True)
    pairs_of_rows = rows.reshape(groups * count, 2, positions)
    step = parts(4 * positions)
    for output, pair in zip(outputs.split(step), which.split(step), strict=True):
        factors = pairs[output, pair].float()
        activations = pairs_of_rows[output // outputs_of_group * count + pair]
        sum_of_two = activations[:, 0] * factors[:, :1] + activations[:, 1] * factors[:, 1:]
        clamped = sum_of_two.clamp(_INT16.min, _INT16.max) - sum_of_two
        difference.index_add_(0, output, clamped.double())
    return difference


@dataclass(frozen=True)
class LayerSaturation:
    """The difference of two INT8 layers' quantized outputs for the same input."""

    name: str
    kind: str
    outputs: int
    """Number of outputs that were compared, or known to be the same for any accumulator."""
    different: int
    """Number of outputs that differ by more than one step of their grid. Libraries round differently by one step: with
    the same accumulators, FBGEMM and qnnpack differ in about one output of ten thousand."""
    largest: int
    """Largest difference, in steps of the output's grid."""
    highest: int = 0
    """Largest code of its input; 0 if its weights can't overflow with any input."""

    @property
    def share(self) -> float:
        return self.different / self.outputs

    @property
    def saturates(self) -> bool:
        """True if 16-bit accumulators were observed to change an output."""
        return self.different > 0


def parts(values: int) -> int:
    """Return how many items of that many values make a chunk, at least one."""
    return max(1, _CHUNK // values)
