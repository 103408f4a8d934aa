"""The guard `overflow=layers`: 7 bits only where a layer's 16-bit accumulators saturate, on the side that costs less.

Calibration images show which layers these are. Reducing the range of activations affects every layer that reads the
tensor; reducing that of weights affects a single layer. So the choice is made for each tensor, by the error of the
outputs of its readers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qexp.config.schema import Overflow, QConfig
from qexp.quantize.calibration.grid import Side, grid


@dataclass(frozen=True)
class ReducedRange:
    """A layer that saturated, and the side that was reduced to 7 bits.

    noise_weights, noise_activations: error of its output with either side reduced, as a share of the output's power
    (sums of squares, against the float layer).
    """

    name: str
    side: Side
    noise_weights: float
    noise_activations: float


@dataclass(frozen=True)
class Reader:
    """A layer, the observer of the tensor that it reads (None if it can't be found), and the output's noise.

    at_risk: its accumulators saturate; narrow: reduces the range of its weights, in place.
    """

    name: str
    observer: Any
    at_risk: bool
    noise: dict[Side | None, float]
    narrow: Callable[[], None]


def narrowed(readers: Iterable[Reader], qconfig: QConfig) -> tuple[ReducedRange, ...]:
    """Reduce one side to 7 bits, in place, of the layers at risk among all; return which side that is of each."""
    chosen: list[ReducedRange] = []
    for group in _by_tensor(readers):
        at_risk = [reader for reader in group if reader.at_risk]
        if not at_risk:
            continue
        with_weights = sum(r.noise[Side.weights if r.at_risk else None] for r in group)
        with_activations = sum(r.noise[Side.activations] for r in group)
        tensor = group[0].observer
        side = Side.activations if tensor is not None and with_activations < with_weights else Side.weights
        if side is Side.activations:
            reduce_activations(tensor, qconfig)
        for reader in at_risk:
            if side is Side.weights:
                reader.narrow()
            chosen.append(ReducedRange(reader.name, side, reader.noise[Side.weights], reader.noise[Side.activations]))
    return tuple(chosen)


def _by_tensor(readers: Iterable[Reader]) -> list[list[Reader]]:
    groups: dict[int, list[Reader]] = {}
    for index, reader in enumerate(readers):
        groups.setdefault(-index - 1 if reader.observer is None else id(reader.observer), []).append(reader)
    return list(groups.values())


def noise(
    compute: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    weight: Tensor,
    observer: Any,
    of_weights: tuple[Any, Any],
    qconfig: QConfig,
) -> dict[Side | None, float]:
    """Return the noise of a layer's output as a share of its power: full range (None), and either side reduced.

    compute: the layer without its bias, from its input and weights; observer: of its input, None if it can't be found;
    of_weights: fed observers of its weights with the full and the reduced range.
    """
    full, reduced = (_on_grid(weight, one) for one in of_weights)
    clean = compute(inputs, weight)
    power = max(float(clean.double().square().sum()), 1e-30)
    rounded = narrow = inputs
    if observer is not None:
        narrower = copy.deepcopy(observer)
        reduce_activations(narrower, qconfig)
        rounded, narrow = _on_grid(inputs, observer), _on_grid(inputs, narrower)

    def share(inputs: Tensor, weight: Tensor) -> float:
        return float((compute(inputs, weight) - clean).double().square().sum()) / power

    return {
        None: share(rounded, full),
        Side.weights: share(rounded, reduced),
        Side.activations: share(narrow, full),
    }


def _on_grid(values: Tensor, observer: Any) -> Tensor:
    """Round to the calibrated scale, and clip to the codes that are executed."""
    scale, zero_point = observer.calculate_qparams()
    low, high = observer.quant_min, getattr(observer, "executed_quant_max", observer.quant_max)
    if scale.numel() > 1:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point.int(), 0, low, high)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point.int(), low, high)


def reduce_activations(observer: Any, qconfig: QConfig) -> None:
    """Set an observer's grid, in place. Its statistics don't depend on the grid, so nothing need be recorded again."""
    set_grid(observer, replace(qconfig, overflow=Overflow.activations), Side.activations)


def set_grid(observer: Any, qconfig: QConfig, side: Side) -> None:
    """Give an observer of torch's interface the grid that a side has with a qconfig, in place."""
    reduced = grid(qconfig, side)
    observer.quant_min, observer.quant_max = reduced.qmin, reduced.qmax
    observer.has_customized_qrange = True
