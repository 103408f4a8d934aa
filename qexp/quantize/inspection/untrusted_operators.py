"""Refusal of operators on INT8 tensors outside of INT8 modules whose output can't be trusted.

An INT8 module has a range of its own for its output. A function has none: torch gives its output the scale of its
(first) input. That is right for functions that only move values, or whose output lies between them, such as pooling and
ReLU. It is wrong if the output's range is another: a concatenation keeps the range of its first tensor, and clips the
others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qexp.errors import InputError, first_line
from qexp.quantize.flow import Flow
from qexp.quantize.graph.tensor_names import place, running
from qexp.quantize.inspection.executed_operators import DispatchMode

_MOVE_VALUES = """
    alias as_strided channel_shuffle chunk clone contiguous detach diagonal expand flatten flip index index_select
    lift_fresh native_channel_shuffle narrow permute pixel_shuffle pixel_unshuffle repeat _reshape_alias reshape rot90
    select slice split split_with_sizes squeeze squeeze_ t t_ tensor_split transpose transpose_ unbind unflatten unfold
    _unsafe_view unsqueeze unsqueeze_ view max min sort topk max_pool1d max_pool2d max_pool3d quantized_max_pool1d
    quantized_max_pool2d quantized_max_pool3d reflection_pad1d reflection_pad2d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
"""
# The range of an input always contains 0, so moving values towards 0 stays inside.
_STAY_BETWEEN_VALUES = """
    mean avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d upsample_bilinear2d grid_sampler_2d relu relu_ relu6 hardtanh hardtanh_
    clamp leaky_relu leaky_relu_ gelu dropout
"""
_HAVE_A_RANGE_OF_THEIR_OWN = "sigmoid tanh hardsigmoid"
_KEEP_THE_RANGE = frozenset(
    f"aten::{name}" for name in f"{_MOVE_VALUES} {_STAY_BETWEEN_VALUES} {_HAVE_A_RANGE_OF_THEIR_OWN}".split()
)
# These insert a number, at this position of the arguments; 0 is in every range.
_KEEP_THE_RANGE_WITH_ZERO = {"aten::constant_pad_nd": 2, "aten::masked_fill": 2, "aten::threshold": 2}
# These allocate memory, without any values yet.
_EMPTY = frozenset({"aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"})
# These join tensors, which is right if all have the same scale.
_JOIN = frozenset({"aten::cat", "aten::stack"})
# All-zero tensors, as in branches of an untrained model, all have this scale or less.
_SCALE_OF_NOTHING = 1e-6
_INSTEAD = {
    "aten::cat": "cat",
    "aten::stack": "cat of unsqueezed tensors",
    "aten::add": "add",
    "aten::mul": "mul",
    "aten::matmul": "matmul",
    "aten::bmm": "matmul",
}
# Allowed distance of an INT8 operator from the same operator in FP32, in steps of its output: half a step for rounding,
# and one at the end of the fixed range of sigmoid and the like, 255/256.
_STEPS = 1.01


_BUG = "INTERNAL ASSERT FAILED"  # torch's words for messages that don't help its users


def run_or_refuse(converted: nn.Module, flow: Flow, example: Tensor) -> None:
    """Run a converted model once, and raise InputError for an operator that can't be trusted, naming its module.

    That is one without an INT8 kernel, one whose output has no range in eager mode, or one whose INT8 kernel computes
    other values than FP32. example: float32 [n, 3, H, W]. torch's engine must be set.
    """
    watched = _Watched(flow)
    with running(converted) as modules:
        try:
            if flow.calibrates:
                # In inference mode torch hides the operators that a function consists of.
                with torch.no_grad(), watched:
                    converted(example)
            # While watched, some of torch's modules don't take their fast path.
            with torch.inference_mode():
                converted(example)
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            where = place(*modules[-1])
            if isinstance(error, _Refused):
                sentence = f"flow={flow.name} can't quantize this model: {where} {error}{watched.advice}"
                raise InputError(sentence) from error
            raise InputError(
                f"flow={flow.name} can't run this model: {where} does something that INT8 tensors don't take "
                f"({watched.failed_in or first_line(error, 400).partition('. This could be')[0]}){watched.advice}"
            ) from error


class _Refused(RuntimeError):
    """Raised with the end of a sentence that begins with the module."""


class _Watched(DispatchMode):
    """Checks each of torch's own (aten) operators that takes INT8 tensors; those of INT8 modules have ranges.

    failed_in: the operator that raised an error; advice: the end of a sentence about it.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow = flow
        self.failed_in, self.advice = "", ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        inputs = [value for value in tree_leaves((args, kwargs)) if _is_int8(value)]
        if not inputs or not name.startswith("aten::") or name in _EMPTY:
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if _BUG in str(error):
                    self.failed_in = name
                raise
        # If functions are observed, joined tensors have one common range.
        unobserved = not self._flow.observes_functions and not _keeps_the_range(name, args, inputs)
        if unobserved and name in _JOIN:  # before torch warns in its own words
            self._refuse(name, args)
        expected = _in_float(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception:
            self.failed_in, self.advice = name, self._advice(name, args)
            raise
        outputs = tree_leaves(result)
        if not any(map(_is_int8, outputs)):
            return result
        if unobserved:
            self._refuse(name, args)
        if expected is not None:
            for output, other in zip(outputs, tree_leaves(expected), strict=False):
                _compare(name, output, other)
        return result

    def _refuse(self, name: str, args: tuple[Any, ...]) -> None:
        self.advice = self._advice(name, args)
        raise _Refused(f"computes {name} on INT8 tensors, for whose output eager mode has no range")

    def _advice(self, name: str, args: tuple[Any, ...]) -> str:
        method = _INSTEAD.get(name.removesuffix("_"))
        if method is None or self._flow.observes_functions:
            return ""
        if method in ("add", "mul") and isinstance(args[1], int | float):
            method += "_scalar"
        elif not all(_is_int8(value) for value in tree_leaves(args) if isinstance(value, Tensor)):
            return ""  # it takes only INT8 tensors
        return f"; write torch.ao.nn.quantized.FloatFunctional().{method} in its place"


def _is_int8(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_quantized


def _in_float(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the operator's result for the same values in FP32; None if it only exists for INT8."""
    floats = tree_map(lambda value: value.dequantize() if _is_int8(value) else value, (args, dict(kwargs)))
    try:
        return func(*floats[0], **floats[1])
    except (RuntimeError, NotImplementedError):
        return None


def _keeps_the_range(name: str, args: Any, inputs: list[Tensor]) -> bool:
    """True if the operator's output lies in the range that torch gives it, whatever the values."""
    if name in _KEEP_THE_RANGE_WITH_ZERO:
        position = _KEEP_THE_RANGE_WITH_ZERO[name]
        return len(args) <= position or args[position] == 0
    if name in _JOIN:
        scales = {(one.q_scale(), one.q_zero_point()) for one in inputs}
        return len(scales) == 1 and inputs[0].q_scale() > _SCALE_OF_NOTHING
    return name in _KEEP_THE_RANGE


def _compare(name: str, output: Any, expected: Any) -> None:
    """Raise _Refused if an INT8 operator's output differs from that of the same operator in FP32."""
    if not _is_int8(output):
        return
    steps = float((output.dequantize() - expected).abs().max()) / output.q_scale() if output.numel() else 0.0
    if not steps <= _STEPS:
        raise _Refused(
            f"computes {name} with these arguments, for which torch's INT8 kernel of "
            f"engine={torch.backends.quantized.engine} is up to {steps:.0f} steps of the output's grid off"
        )
