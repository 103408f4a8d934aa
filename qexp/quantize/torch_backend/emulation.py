"""Emulation of the 16-bit accumulators of x86 without VNNI, in convolutions and linear layers of a converted model.

Kernels there multiply u8 by s8 and add pairs of products in int16, which saturates (the instruction vpmaddubsw), before
they continue in int32. The order in which a kernel goes through a reduction determines the pairs, so its outputs can be
computed on any machine. Orders and rounding are those of the AVX2 kernels of FBGEMM (engines x86 and fbgemm) and oneDNN
(engine onednn) in torch 2.13, and outputs are bit for bit the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qexp.config.schema import Engine
from qexp.errors import InputError
from qexp.quantize.calibration.grid import QUANT_MAX, SAFE_CODE
from qexp.quantize.graph.tensor_names import public
from qexp.quantize.inspection.programs import conv_kind
from qexp.quantize.saturation.accumulators import LayerSaturation, accumulators, overflowing, paired, parts, run_length
from qexp.quantize.torch_backend.engines import engine
from qexp.quantize.torch_backend.ignored_quant_max import is_clamped, quant_max_of, torch_class
from qexp.quantize.torch_backend.layers import is_per_channel, weight_scales
from qexp.quantize.torch_backend.stride_bugs import AfterStride

_TRANSPOSED = (nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d)
_LAYERS = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, *_TRANSPOSED, nnq.Linear)
# By exact type: torch.ao has subclasses that add another tensor, or apply other functions than ReLU.
_EMULATED = (nnq.Conv2d, nniq.ConvReLU2d, nnq.Linear, nniq.LinearReLU)
_RELUS = (nniq.ConvReLU2d, nniq.LinearReLU)


# ------------------------------------------------------------------------------------------------ pairs of weights


def int8_layers(converted: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each INT8 convolution and linear layer with its name in `converted` (see `tensor_names.public`)."""
    for name, module in converted.named_modules():
        if isinstance(module, _LAYERS):
            yield name, module


def at_risk(converted: nn.Module, engine_name: Engine, kinds: Collection[str]) -> bool:
    """True if the weights of any layer let 16-bit accumulators overflow, or if any layer is called as a function.

    kinds: the kinds of layer whose kernels accumulate in 16 bits (see `kernels.overflowing_kinds`).
    """
    if engine_name is Engine.qnnpack or not kinds:
        return False
    if quant_max_of(converted) <= SAFE_CODE:
        return False
    functions = any(_is_int8_function(n) for n in _nodes(converted))
    layers = (layer for _, layer in int8_layers(converted) if _kind(layer) in kinds)
    return functions or any(can_overflow(layer, engine_name) for layer in layers)


def weight_pairs(module: nn.Module, engine_name: Engine) -> Tensor:
    """Return an INT8 convolution's or linear layer's weights, paired as `engine_name` adds their products in 16 bits.

    int16 [out, pairs, 2]. All kernels go through a reduction in the order (kh, kw, channel of the group) and add
    neighbours; a weight without a neighbour is paired with 0. In FBGEMM that is at most the last weight; oneDNN starts
    again at each tap, and qnnpack adds nothing in 16 bits. Raises InputError for transposed convolutions, whose order
    isn't known, and for anything but an INT8 layer.
    """
    layer = _checked(module)
    weight = layer.weight()  # every call unpacks it
    return paired(_flat(weight), run_length(engine_name, weight.shape, _groups(layer)))


def can_overflow(module: nn.Module, engine_name: Engine) -> bool:
    """True if any pair of products can exceed int16; if not, the layer's accumulators are exact for any input.

    Raises InputError for anything but an INT8 layer or an emulated one.
    """
    return bool(overflowing(_possible_pairs(_inner(module), engine_name)).any())


def overflow_test(module: nn.Module, engine_name: Engine) -> Callable[[Tensor], bool]:
    """Return a test of an INT8 layer's input, quint8 [n, channels, ...] or [..., features].

    It is True if any pair of products can exceed int16 with the largest activation of each channel; if not, the
    accumulators are exact. Raises InputError for anything but an INT8 layer or an emulated one.
    """
    layer = _inner(module)
    pairs = _possible_pairs(layer, engine_name)
    outputs, which = overflowing(pairs).nonzero(as_tuple=True)
    if not len(outputs):
        return _never
    risky = pairs[outputs, which]
    if isinstance(layer, _TRANSPOSED):
        # Any activation may be multiplied by any weight, as if there were one channel.
        width, channels = 1, torch.zeros_like(risky, dtype=torch.int64)
    else:
        groups, (of_group, terms, run) = _groups(layer), _reduction(layer, engine_name)
        width, taken = groups * of_group, paired((torch.arange(terms) % of_group)[None], run)[0]
        channels = taken[which] + (outputs // (len(pairs) // groups) * of_group)[:, None]
    along = -1 if isinstance(layer, (nnq.Linear, EmulatedLinear)) else 1

    def test(images: Tensor) -> bool:
        largest = images.int_repr().movedim(along, -1).reshape(-1, width).amax(0).int()
        # Borders are padded with the zero point.
        return bool(overflowing(risky, largest.clamp(min=images.q_zero_point())[channels]).any())

    return test


def _never(images: Tensor) -> bool:
    return False


def _possible_pairs(layer: Any, engine_name: Engine) -> Tensor:
    """Return `weight_pairs`; for a transposed convolution, whose order isn't known, the extremes of any two weights."""
    if isinstance(layer, _Emulated):
        return layer.pairs
    if not isinstance(layer, _TRANSPOSED):
        return weight_pairs(layer, engine_name)
    extremes = torch.stack(layer.weight().int_repr().to(torch.int16).aminmax())
    return torch.stack([extremes, extremes * (engine_name is not Engine.qnnpack)], dim=1)[:, None]


def _inner(module: nn.Module) -> Any:
    """Return the layer itself; Any, since torch.ao's classes are untyped."""
    return module.conv if isinstance(module, AfterStride) else module


def _checked(module: nn.Module) -> Any:
    layer = _inner(module)
    if not isinstance(layer, _LAYERS) or isinstance(layer, _TRANSPOSED):
        raise InputError(f"{type(layer).__name__} is no INT8 layer whose order of accumulation is known")
    return layer


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def _reduction(layer: Any, engine_name: Engine) -> tuple[int, int, int]:
    """Return the channels of a group, the terms that are accumulated for an output, and `run_length`."""
    if isinstance(layer, _Emulated):
        return layer.channels, layer.terms, layer.run
    weight = layer.weight()
    return weight.shape[1], weight[0].numel(), run_length(engine_name, weight.shape, _groups(layer))


def _flat(weight: Tensor) -> Tensor:
    """Return quantized weights [out, channels, ...] as int16 [out, terms], the channels of a tap side by side."""
    out, channels = weight.shape[:2]
    return weight.int_repr().to(torch.int16).reshape(out, channels, -1).transpose(1, 2).flatten(1)


# ------------------------------------------------------------------------------------------------ emulated layers


def with_emulated_accumulators(
    converted: nn.Module, engine_name: Engine, saturating: bool = True, kinds: Collection[str] | None = None
) -> nn.Module:
    """Return a copy of a converted model (eager or FX) whose layers compute as AVX2 kernels do, on any machine.

    These are all INT8 Conv2d and Linear layers, with ReLU or without, dense, grouped and depthwise; `not_emulated`
    names the others, which run as before, so run the copy within `engine(engine_name)`. With saturating=False
    accumulators are exact and only the rounding is the engine's. x86 means FBGEMM, which runs all its layers without
    VNNI. kinds: of layer, None for all. Raises InputError for qnnpack, which has no 16-bit accumulators.
    """
    if engine_name is Engine.qnnpack:
        raise InputError("engine=qnnpack has exact accumulators: there are no 16-bit ones to emulate")
    with engine(engine_name):
        # Layers are packed again, for the engine that is set.
        copied = copy.deepcopy(converted)
    emulated: dict[nn.Module, nn.Module] = {}
    for owner in list(copied.modules()):
        for name, child in list(owner._modules.items()):
            if child is None or torch_class(child) not in _EMULATED:
                continue
            if kinds is None or _kind(child) in kinds:
                # One layer under two names stays one.
                emulated[child] = emulated.get(child) or _emulate(child, engine_name, saturating)
                setattr(owner, name, emulated[child])
    return copied


def not_emulated(converted: nn.Module) -> tuple[str, ...]:
    """Names of the INT8 layers that `with_emulated_accumulators` leaves alone: 1- and 3-dimensional ones, transposed
    ones, those fused with something else than ReLU, and those called as functions.
    """
    modules = [
        public(name, converted) for name, module in int8_layers(converted) if torch_class(module) not in _EMULATED
    ]
    return (*modules, *(node.name for node in _nodes(converted) if _is_int8_function(node)))


def _nodes(converted: nn.Module) -> list[fx.Node]:
    return list(converted.graph.nodes) if isinstance(converted, fx.GraphModule) else []


def _is_int8_function(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith(("quantized.conv", "quantized.linear"))


def _emulate(layer: nn.Module, engine_name: Engine, saturating: bool) -> nn.Module:
    if isinstance(layer, nnq.Conv2d):
        return EmulatedConv2d(layer, engine_name, saturating)
    assert isinstance(layer, nnq.Linear)
    return EmulatedLinear(layer, engine_name, saturating)


class _Emulated(nn.Module):
    """The common part of emulated layers: from rows of activations to output codes."""

    pairs: Tensor
    bias: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: Any, engine_name: Engine, saturating: bool) -> None:
        super().__init__()
        weight = layer.weight()
        self.relu = torch_class(layer) in _RELUS
        self.quant_max = layer.quant_max if is_clamped(layer) else QUANT_MAX
        self.scale, self.zero_point = float(layer.scale), int(layer.zero_point)
        self.groups, self.kind = _groups(layer), _kind(layer)
        self.channels, self.terms, self.run = _reduction(layer, engine_name)
        self.per_channel = is_per_channel(weight)
        scale, zero_point = weight_scales(weight)
        bias = layer.bias()
        self.register_buffer("pairs", weight_pairs(layer, engine_name))
        self.saturating = saturating and can_overflow(self, engine_name)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("weight_scale", scale.float())
        self.register_buffer("weight_zero_point", zero_point.double())
        self.requantized: Callable[[_Emulated, Tensor, float], Tensor] = _as_fbgemm
        if engine_name is Engine.onednn:
            self.requantized = _as_onednn
            if isinstance(layer, nnq.Linear):
                # In convolutions only the activations' scales go through their reciprocals.
                self.weight_scale = _reciprocal(_reciprocal(self.weight_scale))

    def codes(self, rows: Tensor, input_scale: float, input_zero_point: int) -> Tensor:
        """Return output codes, uint8 [out, positions], for activations as float32 [groups, terms, positions]."""
        sums = accumulators(paired(rows, self.run), self.pairs, self.saturating)
        weights = self.pairs.double().sum((1, 2)) - self.terms * self.weight_zero_point
        sums -= input_zero_point * weights[:, None]
        if self.weight_zero_point.any():
            activations = rows.double().sum(1).repeat_interleave(len(sums) // self.groups, dim=0)
            sums -= self.weight_zero_point[:, None] * activations
        return self.requantized(self, sums, input_scale)

    def quantized(self, codes: Tensor) -> Tensor:
        made: Tensor = torch._make_per_tensor_quantized_tensor(codes, self.scale, self.zero_point)
        return made


class EmulatedLinear(_Emulated):
    """An emulated linear layer, from and to quint8 [..., features]."""

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs.int_repr()
        rows = values.reshape(-1, self.terms).T.float()
        scale, zero_point = inputs.q_scale(), inputs.q_zero_point()
        made = [self.codes(r[None], scale, zero_point) for r in rows.split(parts(self.terms), dim=1)]
        return self.quantized(torch.cat(made, dim=1).T.reshape(*values.shape[:-1], -1).contiguous())


class EmulatedConv2d(_Emulated):
    """An emulated convolution, from and to quint8 [n, channels, rows, columns]."""

    def __init__(self, layer: nnq.Conv2d, engine_name: Engine, saturating: bool) -> None:
        super().__init__(layer, engine_name, saturating)
        self.kernel, self.stride, self.dilation = _two(layer.kernel_size), _two(layer.stride), _two(layer.dilation)
        above, left = _two(layer.padding)
        self.padding = (left, left, above, above)
        self.padding_mode = layer.padding_mode

    def forward(self, inputs: Tensor) -> Tensor:
        scale, zero_point = inputs.q_scale(), inputs.q_zero_point()
        windows = self._windows(self._padded(inputs.int_repr().float(), zero_point))
        rows, columns = windows.shape[-2:]
        made = [
            self.codes(some.reshape(self.groups, self.terms, -1), scale, zero_point)
            for some in windows.split(parts(self.groups * self.terms * rows * columns), dim=4)
        ]
        codes = torch.cat(made, dim=1).unflatten(1, (-1, rows, columns)).transpose(0, 1)
        return self.quantized(codes.contiguous(memory_format=torch.channels_last))

    def _padded(self, images: Tensor, zero_point: int) -> Tensor:
        if self.padding_mode == "zeros":
            # The zero point represents 0.
            return F.pad(images, self.padding, value=zero_point)
        return F.pad(images, self.padding, mode=self.padding_mode)

    def _windows(self, images: Tensor) -> Tensor:
        """Return a view of images [n, channels, ...] as [groups, kh, kw, channels of a group, n, rows, columns]."""
        windows = images.contiguous().unflatten(1, (self.groups, -1))
        for dimension, size, stride, dilation in zip((3, 4), self.kernel, self.stride, self.dilation, strict=True):
            windows = windows.unfold(dimension, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return windows.permute(1, 5, 6, 2, 0, 3, 4)


def _as_fbgemm(layer: _Emulated, sums: Tensor, input_scale: float) -> Tensor:
    """Requantize as requantizeOutputProcessingAvx2 in FBGEMM's QuantUtilsAvx2.cc: uint8 [out, positions].

    It divides the bias by the product of scales if weights are per channel. Per tensor it multiplies by the reciprocal,
    which its compiler fuses with the addition, so that both are rounded once; here float64 does that.
    """
    product = _float32(input_scale) * layer.weight_scale
    values = sums.float()
    if layer.bias is not None and layer.per_channel:
        values = values + (layer.bias / product)[:, None]
    elif layer.bias is not None:
        values = (values.double() + (layer.bias.double() * _reciprocal(product).double())[:, None]).float()
    steps = (values * (product / _float32(layer.scale))[:, None]).round()
    return (steps + layer.zero_point).clamp(layer.zero_point if layer.relu else 0, layer.quant_max).to(torch.uint8)


def _as_onednn(layer: _Emulated, sums: Tensor, input_scale: float) -> Tensor:
    """Requantize as store_output in oneDNN's jit_uni_x8s8s32x_conv_kernel.cpp: uint8 [out, positions].

    It adds the zero point before it rounds. torch passes it the reciprocals of scales, which are rounded again.
    """
    product = _reciprocal(_reciprocal(input_scale)) * layer.weight_scale
    values = sums.float() * product[:, None]
    if layer.bias is not None:
        values = values + layer.bias[:, None]
    if layer.relu:
        values = values.clamp(min=0)
    inverse = _reciprocal(_reciprocal(_reciprocal(layer.scale)))
    return (values * inverse + layer.zero_point).clamp(0, layer.quant_max).round().to(torch.uint8)


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _reciprocal(value: Tensor | float) -> Tensor:
    """Return the reciprocal, rounded once, to float32."""
    return torch.as_tensor(value, dtype=torch.float64).reciprocal().float()


def _two(values: Sequence[int] | str) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


# ------------------------------------------------------------------------------------------------ layer by layer


@contextmanager
def compared(
    executed: nn.Module, other: nn.Module, engine_name: Engine, whole: bool = False
) -> Iterator[dict[str, LayerSaturation]]:
    """While `other` runs in this context, compare each of its INT8 layers with its namesake in `executed`.

    Both get the same input, so each layer is judged by itself, whatever happened in those before it. The comparisons
    are yielded by layer, in the order of calls. If the activations are too small for 16 bits to overflow (see
    `overflow_test`), both layers have the same accumulators, and the engine's own kernel computes the output, unless
    the `whole` of other is to run. Both models are converted from the same prepared one for `engine_name`, or one of
    them is an emulated copy. The kind is conv, pointwise, grouped, depthwise or linear. Raises InputError if `executed`
    lacks a layer of `other`.
    """
    theirs, mine = _by_name(other), _by_name(executed)
    missing = [name for name in theirs if name not in mine]
    if missing:
        raise InputError(f"the executed model has no INT8 layer {missing[0]}, so the two can't be compared")
    found: dict[str, LayerSaturation] = {}

    def compare(name: str) -> Callable[[Tensor], Tensor]:
        own, namesake = theirs[name].forward, mine[name]
        kind, can_overflow_with = _kind(theirs[name]), overflow_test(namesake, engine_name)
        kernel = own if whole or isinstance(namesake, _Emulated) else namesake

        def forward(images: Tensor) -> Tensor:
            different = largest = 0
            if can_overflow_with(images):
                output = own(images)
                steps = (namesake(images).int_repr().int() - output.int_repr().int()).abs()
                different, largest = int((steps > 1).sum()), int(steps.max())
            else:
                output = kernel(images)
            before = found.get(name, LayerSaturation(name, kind, 0, 0, 0))
            highest = 0 if can_overflow_with is _never else int(images.int_repr().max())
            found[name] = LayerSaturation(
                name,
                kind,
                before.outputs + output.numel(),
                before.different + different,
                max(before.largest, largest),
                max(before.highest, highest),
            )
            return output

        return forward

    forwards = {name: compare(name) for name in theirs}
    for name, layer in theirs.items():
        vars(layer)["forward"] = forwards[name]
    try:
        yield found
    finally:
        for layer in theirs.values():
            del vars(layer)["forward"]


def layer_by_layer(
    executed: nn.Module, other: nn.Module, batches: Iterable[Tensor], engine_name: Engine
) -> tuple[LayerSaturation, ...]:
    """Run `other` on batches, float32 [n, 3, H, W], and compare its layers with `executed` (see `compared`)."""
    with compared(executed, other, engine_name) as found, engine(engine_name), torch.inference_mode():
        for batch in batches:
            other(batch)
    return tuple(found.values())


def _by_name(converted: nn.Module) -> dict[str, nn.Module]:
    """Return each INT8 layer by its public name, including an `AfterStride` around it."""
    found: dict[str, nn.Module] = {}
    for name, module in converted.named_modules():
        if isinstance(module, (*_LAYERS, _Emulated, AfterStride)):
            found.setdefault(public(name, converted), module)
    return found


def _kind(module: Any) -> str:
    layer = _inner(module)
    if isinstance(layer, _Emulated):
        return layer.kind
    if isinstance(layer, nnq.Linear):
        return "linear"
    return "conv_transpose" if isinstance(layer, _TRANSPOSED) else conv_kind(layer.weight().shape, layer.groups)
