"""Workarounds for three bugs of torch's INT8 kernels that depend on strides.

oneDNN's pointwise convolutions with a stride have randomly wrong outputs. Measured with torch 2.13 on AVX2: for a 1x1
INT8 convolution with stride 2, 8, 24, 40, 56 or 72 input channels (not a multiple of 16) and two threads, up to three
quarters of the calls are wrong, by as much as 49 steps of 255. The threads share a workspace that is too small, as in
https://github.com/uxlfoundation/oneDNN/issues/6035. Taking every second pixel first and convolving without a stride is
the same sum of the same products, and needs no workspace.

torch refuses the mean of an INT8 tensor that is channels-last and contiguous at once (1x1 maps, a single channel):
"required rank 4 tensor to use channels_last format".

qnnpack's clamp (ReLU6, Hardtanh, clamp; not ReLU) treats every tensor as contiguous, but convolutions return
channels-last: with torch 2.13 everything behind one was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.ao.nn.quantized as nnq
from torch import Tensor, fx, nn

from qexp.config.schema import Engine
from qexp.quantize.graph.clamps import RELU, clamp_of

# x86 passes convolutions to oneDNN if the CPU has VNNI.
_ONEDNN_INSIDE = (Engine.onednn, Engine.x86)
_SAFE_CHANNELS = 16


class AfterStride(nn.Module):
    """An INT8 1x1 convolution whose stride is taken before it."""

    parts_of_one_layer = ("conv",)

    def __init__(self, conv: nnq.Conv2d) -> None:
        super().__init__()
        self.rows, self.columns = conv.stride
        weight, bias = conv._weight_bias()
        conv.stride = (1, 1)
        conv.set_weight_bias(weight, bias)
        self.conv = conv

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.conv(images[:, :, :: self.rows, :: self.columns])
        return output


def affected(module: nnq.Conv2d, engine: Engine) -> bool:
    """True if oneDNN would compute this INT8 convolution with the workspace that is too small."""
    return (
        engine in _ONEDNN_INSIDE
        and tuple(module.kernel_size) == (1, 1)
        and max(module.stride) > 1
        and not any(module.padding)
        and module.groups == 1
        and module.in_channels % _SAFE_CHANNELS != 0
    )


def without_strides(converted: nn.Module, engine: Engine) -> nn.Module:
    """Take the strides of affected convolutions before them, in place, and return the model."""
    for module in list(converted.modules()):
        for name, child in module.named_children():
            if isinstance(child, nnq.Conv2d) and affected(child, engine):
                setattr(module, name, AfterStride(child))
    return converted


def contiguous_clamps(converted: nn.Module, engine: Engine) -> nn.Module:
    """Give qnnpack's clamps contiguous tensors and both bounds, in place, and return the model."""
    if engine is not Engine.qnnpack:
        return converted
    for module in converted.modules():
        if isinstance(module, nn.Hardtanh | nnq.ReLU6):
            module.register_forward_pre_hook(_contiguous)
    if isinstance(converted, fx.GraphModule):
        modules = dict(converted.named_modules(remove_duplicate=False))
        for node in list(converted.graph.nodes):
            clamp = clamp_of(node, modules) if node.op != "call_module" else None
            if clamp is None or clamp == RELU:
                continue
            with converted.graph.inserting_before(node):
                before = converted.graph.call_method("contiguous", (node.args[0],))
            node.replace_input_with(node.args[0], before)
            if math.inf in (-clamp.low, clamp.high):
                node.args, node.kwargs = (before, clamp.low, clamp.high), {}
        converted.recompile()
    return converted


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.contiguous() for one in inputs)


def strides_are_ambiguous(size: Sequence[int]) -> bool:
    """True if a tensor of this shape, [n, channels, height, width], is contiguous and channels-last at once."""
    return len(size) > 2 and (size[1] == 1 or all(one == 1 for one in size[2:]))


def contiguous_strides(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output with contiguous strides, where channels-last has the same order: a forward hook."""
    return output.flatten().view(output.shape)
