"""The guard `overflow=layers` on a model of torch's modules: its layers, and their noise with 7 bits on either side."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.quantization import QConfig as TorchQConfig

from qexp.config.schema import Overflow, QConfig
from qexp.quantize.calibration.grid import Side
from qexp.quantize.calibration.observers import observers, records_range
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.graph.hooks import attached
from qexp.quantize.graph.tensor_names import public
from qexp.quantize.saturation.narrowing import Reader, ReducedRange, narrowed, noise
from qexp.quantize.torch_backend.observers import weight_observer

_LAYERS = (nn.Conv2d, nn.Linear)
# Layers whose output is on the grid of their input.
_KEEP_GRID = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Dropout, nn.Flatten, nn.Hardtanh, nn.Identity, nn.MaxPool2d, nn.ReLU,
)  # fmt: skip


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


def reduce_range_of_layers(
    prepared: nn.Module, risky: Collection[str], qconfig: QConfig, example: Tensor
) -> tuple[nn.Module, tuple[ReducedRange, ...]]:
    """Return a copy of a calibrated model with 7 bits on one side of the layers `risky`, and which side that is.

    risky: names in the user's model; example: calibration images on which the noise is measured, float32 [n, 3, H, W].
    """
    prepared = sharing_copy(prepared)
    return prepared, narrowed(_readers(prepared, risky, qconfig, example), qconfig)


def _readers(prepared: nn.Module, risky: Collection[str], qconfig: QConfig, example: Tensor) -> list[Reader]:
    """Run the example once; find every layer's input observer, and its noise with 7 bits on either side."""
    made_by: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice
    found: list[Reader] = []
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
            of_user, narrow = public(name, prepared), partial(_reduce_weights, module, qconfig)
            found.append(
                Reader(of_user, observer, of_user in risky, _noise(module, observer, qconfig, inputs[0]), narrow)
            )

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
    layer: Any = module[0] if isinstance(module, _FusedModule) else module
    full, reduced = (_fed(replace(qconfig, overflow=one), layer) for one in (Overflow.none, Overflow.weights))
    return noise(partial(_linear, layer), inputs, layer.weight, observer, (full, reduced), qconfig)


def _linear(layer: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight)
    output: Tensor = layer._conv_forward(inputs, weight, None)
    return output


def _fed(qconfig: QConfig, layer: nn.Module) -> Any:
    observer = weight_observer(qconfig, qconfig.weight.granularity)()
    observer(layer.weight)
    return observer


def _reduce_weights(module: Any, qconfig: QConfig) -> None:
    """Set the qconfig of a layer and of its first part, in place; `convert` makes the observer of weights from it."""
    reduced = replace(qconfig, overflow=Overflow.weights)
    made = TorchQConfig(module.qconfig.activation, weight_observer(reduced, qconfig.weight.granularity))
    for part in (module, module[0]) if isinstance(module, _FusedModule) else (module,):
        part.qconfig = made
