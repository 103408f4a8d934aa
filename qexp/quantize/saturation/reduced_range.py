"""The guard `overflow=layers`: 7 bits only where a layer's 16-bit accumulators saturate, on the side that costs less.

Calibration images show which layers these are. Reducing the range of activations affects every layer that reads the
tensor; reducing that of weights affects a single layer. So the choice is made for each tensor, by the error of the
outputs of its readers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.quantization import QConfig as TorchQConfig

from qexp.config.schema import Overflow, QConfig
from qexp.quantize.calibration.grid import Side, grid
from qexp.quantize.calibration.observers import observers, records_range, weight_observer
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.graph.hooks import attached
from qexp.quantize.graph.tensor_names import public

_LAYERS = (nn.Conv2d, nn.Linear)
# Layers whose output is on the grid of their input.
_KEEP_GRID = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Dropout, nn.Flatten, nn.Hardtanh, nn.Identity, nn.MaxPool2d, nn.ReLU,
)  # fmt: skip


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


def _layers(prepared: nn.Module) -> dict[str, nn.Module]:
    """Return convolutions and linear layers that will be quantized, fused ones as a whole, by name in `prepared`."""
    found: dict[str, nn.Module] = {}
    for name, module in prepared.named_modules():
        owner = prepared.get_submodule(name.rpartition(".")[0])
        inner = module[0] if isinstance(module, _FusedModule) else module
        quantized = getattr(module, "qconfig", None) is not None
        if isinstance(inner, _LAYERS) and quantized and not isinstance(owner, _FusedModule):
            found[name] = module
    return found


@dataclass
class _Reader:
    """A layer, the observer of the tensor that it reads (None if it can't be found), and the output's noise."""

    name: str
    observer: nn.Module | None
    at_risk: bool
    noise: dict[Side | None, float]


def reduce_range_of_layers(
    prepared: nn.Module, risky: Collection[str], qconfig: QConfig, example: Tensor
) -> tuple[nn.Module, tuple[ReducedRange, ...]]:
    """Return a copy of a calibrated model with 7 bits on one side of the layers `risky`, and which side that is.

    risky: names in the user's model; example: calibration images on which the noise is measured, float32 [n, 3, H, W].
    """
    prepared = sharing_copy(prepared)
    readers = _readers(prepared, risky, qconfig, example)
    chosen: list[ReducedRange] = []
    for group in _by_tensor(readers):
        at_risk = [reader for reader in group if reader.at_risk]
        if not at_risk:
            continue
        with_weights = sum(r.noise[Side.weights if r.at_risk else None] for r in group)
        with_activations = sum(r.noise[Side.activations] for r in group)
        tensor = group[0].observer
        side = Side.activations if tensor is not None and with_activations < with_weights else Side.weights
        if tensor is not None and side is Side.activations:
            _reduce_activations(tensor, qconfig)
        for reader in at_risk:
            if side is Side.weights:
                _reduce_weights(prepared.get_submodule(reader.name), qconfig)
            noise = (reader.noise[Side.weights], reader.noise[Side.activations])
            chosen.append(ReducedRange(public(reader.name, prepared), side, *noise))
    return prepared, tuple(chosen)


def _by_tensor(readers: list[_Reader]) -> list[list[_Reader]]:
    groups: dict[int, list[_Reader]] = {}
    for index, reader in enumerate(readers):
        groups.setdefault(-index - 1 if reader.observer is None else id(reader.observer), []).append(reader)
    return list(groups.values())


def _readers(prepared: nn.Module, risky: Collection[str], qconfig: QConfig, example: Tensor) -> list[_Reader]:
    """Run the example once; find every layer's input observer, and its noise with 7 bits on either side."""
    made_by: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice
    found: list[_Reader] = []
    watching = {id(o): o for o in observers(prepared).values() if records_range(o)}

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(module) in watching:
            made_by[output.data_ptr()] = module
        elif inputs[0].data_ptr() in made_by:
            made_by[output.data_ptr()] = made_by[inputs[0].data_ptr()]
        alive.append(output)

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            observer = made_by.get(inputs[0].data_ptr())
            noise = _noise(module, observer, qconfig, inputs[0])
            found.append(_Reader(name, observer, public(name, prepared) in risky, noise))

        return look

    layers = (m.register_forward_pre_hook(before(name)) for name, m in _layers(prepared).items())
    tracked = [m for m in prepared.modules() if id(m) in watching or isinstance(m, _KEEP_GRID)]
    # Observers are bypassed, so that their statistics stay those of calibration.
    states = [(o, o.forward) for o in watching.values()]
    for o, _ in states:
        o.forward = lambda x: x
    try:
        with torch.inference_mode(), attached(layers), attached(m.register_forward_hook(after) for m in tracked):
            prepared(example)
    finally:
        for o, _ in states:
            del o.forward
    return found


def _noise(module: Any, observer: Any, qconfig: QConfig, inputs: Tensor) -> dict[Side | None, float]:
    """Return the noise of a layer's output as a share of its power: full range (None), and either side reduced."""
    layer: Any = module[0] if isinstance(module, _FusedModule) else module
    full, reduced = (replace(qconfig, overflow=o) for o in (Overflow.none, Overflow.weights))
    weights = {side: _on_grid(layer.weight, _fed(q, layer)) for side, q in ((None, full), (Side.weights, reduced))}
    clean = _linear(layer, inputs, layer.weight)
    power = max(float(clean.double().square().sum()), 1e-30)
    tensors = {None: inputs, Side.activations: inputs}
    if observer is not None:
        tensors = {
            None: _on_grid(inputs, observer),
            Side.activations: _on_grid(inputs, _with_reduced_range(observer, qconfig)),
        }

    def share(inputs: Tensor, weight: Tensor) -> float:
        return float((_linear(layer, inputs, weight) - clean).double().square().sum()) / power

    return {
        None: share(tensors[None], weights[None]),
        Side.weights: share(tensors[None], weights[Side.weights]),
        Side.activations: share(tensors[Side.activations], weights[None]),
    }


def _linear(layer: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight)
    output: Tensor = layer._conv_forward(inputs, weight, None)
    return output


def _fed(qconfig: QConfig, layer: nn.Module) -> Any:
    observer = weight_observer(qconfig, qconfig.weight.granularity)()
    observer(layer.weight)
    return observer


def _on_grid(values: Tensor, observer: Any) -> Tensor:
    """Round to the calibrated scale, and clip to the codes that are executed."""
    scale, zero_point = observer.calculate_qparams()
    low, high = observer.quant_min, getattr(observer, "executed_quant_max", observer.quant_max)
    if scale.numel() > 1:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point.int(), 0, low, high)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point.int(), low, high)


def _with_reduced_range(observer: Any, qconfig: QConfig) -> Any:
    reduced = copy.deepcopy(observer)
    _reduce_activations(reduced, qconfig)
    return reduced


def _reduce_activations(observer: Any, qconfig: QConfig) -> None:
    """Set an observer's grid, in place. Its statistics don't depend on the grid, so nothing need be recorded again."""
    reduced_grid = grid(replace(qconfig, overflow=Overflow.activations), Side.activations)
    observer.quant_min, observer.quant_max = reduced_grid.qmin, reduced_grid.qmax
    observer.has_customized_qrange = True


def _reduce_weights(module: Any, qconfig: QConfig) -> None:
    """Set the qconfig of a layer and of its first part, in place; `convert` makes the observer of weights from it."""
    reduced = replace(qconfig, overflow=Overflow.weights)
    made = TorchQConfig(module.qconfig.activation, weight_observer(reduced, qconfig.weight.granularity))
    for part in (module, module[0]) if isinstance(module, _FusedModule) else (module,):
        part.qconfig = made
