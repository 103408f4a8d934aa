"""Depthwise convolutions for which FBGEMM has no fast kernel.

It then computes one channel after the other as a matrix product. Measured with torch 2.13 on Zen 4, one thread, 104 to
132 channels at 14x14 to 32x32: 36 to 1,200 times as long as oneDNN takes; with a fast kernel FBGEMM is as fast as that.
"""

from __future__ import annotations

from typing import Any

import torch.ao.nn.quantized as nnq
from torch import nn

from qexp.config.schema import Engine
from qexp.quantize.graph.tensor_names import public

# x86 passes convolutions to oneDNN if the CPU has VNNI, but not those of more groups (torch's qconv_prepack.cpp).
_MOST_GROUPS = 100
_WINDOWS = (3, 5, 7)


def without_fast_kernel(converted: nn.Module, engine_name: Engine, vnni: bool) -> tuple[str, ...]:
    """Return names of the depthwise convolutions that FBGEMM runs without a fast kernel, though oneDNN has one.

    vnni: True if dense kernels of this machine use VNNI.
    """
    if engine_name not in (Engine.x86, Engine.fbgemm):
        return ()
    fewest = _MOST_GROUPS + 1 if engine_name is Engine.x86 and vnni else 1
    layers = [(name, m) for name, m in converted.named_modules() if isinstance(m, nnq.Conv2d)]
    return tuple(public(name, converted) for name, layer in layers if layer.groups >= fewest and _is_slow(layer))


def _is_slow(layer: Any) -> bool:
    # With more outputs than inputs oneDNN has no fast kernel, either.
    depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    inside = tuple(layer.padding) == ((rows - 1) // 2, (columns - 1) // 2)
    window = rows == columns and rows in _WINDOWS and inside and max(layer.dilation) == 1
    return depthwise and not (layer.groups % 8 == 0 and window and down == right and down <= 2)
