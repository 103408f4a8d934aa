"""A fake-quantized model: the expected outputs of an INT8 model, computed without torch's INT8 kernels.

It is made from the prepared model, before torch converts it: each observer becomes a rounding to the grid that it has
found, each weight is rounded to a grid that is computed here, and everything between is the float operation.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from qexp.quantize.calibration.observers import observers

_KEEPS_GRID = {
    *("mean", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "upsample_bilinear2d"),
    *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "_max_pool2d", "max_pool2d"),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "dropout"),
}
"""Names of functions whose INT8 kernels return values on the grid of their argument. For the first line that is one
more rounding; the others are listed because their output may be averaged next."""


_PRODUCTS, _SUMS = {operator.mul, torch.mul, "mul"}, {operator.add, torch.add, "add"}


@dataclass(frozen=True)
class Grid:
    """The quantization grid: integers low…high, with their scale and zero point."""

    scale: float
    zero_point: int
    low: int
    high: int

    def rounded(self, values: Tensor) -> Tensor:
        output = torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, self.low, self.high)
        output.grid = self  # type: ignore[attr-defined]
        return output


_FIXED_GRIDS = {
    "sigmoid": Grid(1 / 256, 0, 0, 255),
    "hardsigmoid": Grid(1 / 256, 0, 0, 255),
    "tanh": Grid(1 / 128, 128, 0, 255),
}
"""Output grids of functions whose INT8 kernels have a fixed one, by name."""


class Rounding(nn.Module):
    """Rounds its input to a grid; takes the place of an observer."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def forward(self, x: Any) -> Any:
        return self.grid.rounded(x) if isinstance(x, Tensor) and x.is_floating_point() else x


class GridPassing(TorchFunctionMode):
    """Within the mode, outputs of `_KEEPS_GRID` functions of a rounded tensor are rounded to the same grid."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        grid = getattr(args[0], "grid", None) if args and isinstance(args[0], Tensor) else None
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if grid is not None and isinstance(output, Tensor) and name != "__get__":
            if name in _KEEPS_GRID or name in _FIXED_GRIDS:
                return _FIXED_GRIDS.get(name, grid).rounded(output)
            if output is args[0]:
                del output.grid  # type: ignore[attr-defined]
        return output


class FakeQuantized(nn.Module):
    """A calibrated model with its tensors rounded to their grids; weights: symmetric, per channel, `weight_bits`."""

    def __init__(self, prepared: nn.Module, weight_bits: int = 8):
        super().__init__()
        self.model = copy.deepcopy(prepared)
        for name, observer in observers(self.model).items():
            scale, zero_point = observer.calculate_qparams()
            grid = Grid(float(scale), int(zero_point), observer.quant_min, observer.quant_max)
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, Rounding(grid))
        for name in _idle_observers(self.model):
            setattr(self.model, name, nn.Identity())
        for layer in _quantized_layers(self.model):
            layer.weight = nn.Parameter(_rounded_weight(layer, weight_bits), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(), GridPassing():
            return self.model(x)


def _quantized_layers(model: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers whose input is rounded."""
    calls = _inputs(model) if isinstance(model, fx.GraphModule) else None
    layers = []
    for name, module in model.named_modules():
        layer = module[0] if isinstance(module, _FusedModule) else module
        inside = isinstance(model.get_submodule(name.rpartition(".")[0]), _FusedModule)
        if inside or not isinstance(layer, _ConvNd | nn.Linear) or getattr(module, "qconfig", None) is None:
            continue
        if calls is None or isinstance(calls.get(name), Rounding):
            layers.append(layer)
    return layers


def _idle_observers(model: nn.Module) -> list[str]:
    """Names of observers after a product or sum of a tensor and a number, where INT8 kernels keep the integers and
    change scale or zero point, whatever was observed."""
    if not isinstance(model, fx.GraphModule):
        return []
    return [
        str(user.target)
        for node in model.graph.nodes
        if (node.target in _PRODUCTS and any(isinstance(value, int | float) for value in node.args))
        or (node.target in _SUMS and isinstance(node.args[1], int | float))
        for user in node.users
        if user.op == "call_module" and isinstance(model.get_submodule(str(user.target)), Rounding)
    ]


def _inputs(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    """For each module that is called on another's output, by name, that other module."""
    return {
        str(node.target): graph_module.get_submodule(str(node.all_input_nodes[0].target))
        for node in graph_module.graph.nodes
        if node.op == "call_module" and node.all_input_nodes and node.all_input_nodes[0].op == "call_module"
    }


def _rounded_weight(layer: nn.Module, bits: int) -> Tensor:
    weight = layer.weight.detach()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # torch's symmetric grids have half a step more than `high` on either side.
    if isinstance(layer, _ConvTransposeNd):
        scale = float(weight.abs().max()) / (high + 0.5)
        return torch.fake_quantize_per_tensor_affine(weight, scale, 0, low, high)
    scales = weight.abs().flatten(1).amax(1) / (high + 0.5)
    return torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(len(scales)).int(), 0, low, high)
