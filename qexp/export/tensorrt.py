"""A model as TensorRT takes it: explicit quantization with zero points of 0, or a float model and a calibration cache.

TensorRT's INT8 is symmetric (https://docs.nvidia.com/deeplearning/tensorrt, "Working with Quantized Types"): codes are
int8, zero points 0, weights per channel on axis 0. quint8 with zero point 128 has the same values, so runs with
`qconfig.activation.scheme=symmetric` can ship there. No clamp of codes may stand between a quantize and a dequantize
operator, so they are clamps of the float tensor before it, which TensorRT fuses.

The calibration cache is for its implicit quantization, of a model without such operators: a line that names the version
and the calibrator, and then for each tensor its name and scale, the 32 bits of a float in big-endian hexadecimals.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexp.errors import RunError

if TYPE_CHECKING:
    import onnx

HEADER = "TRT-100000-EntropyCalibration2"
_MIDDLE = 128  # the zero point of symmetric quint8


def convert(path: Path, cache: Path) -> None:
    """Rewrite an ONNX file of a symmetric run for TensorRT, in place; write `float.onnx` and the calibration cache
    beside it.

    Raises RunError, which names the tensor, where a zero point isn't 0.
    """
    import onnx

    proto = onnx.load(str(path))
    _clamps_before(proto.graph)
    _around_zero(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    scales = _without_quantization(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    (path.parent / "float.onnx").write_bytes(proto.SerializeToString())
    cache.write_text(cache_text(scales))


def cache_text(scales: dict[str, float]) -> str:
    """The calibration cache of tensors with these scales."""
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()]
    return "\n".join([HEADER, *lines]) + "\n"


def _values(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def _clamps_before(graph: onnx.GraphProto) -> None:
    """Replace each clamp of codes by one of the tensor that is quantized, in place."""
    from onnx import helper, numpy_helper

    values, makers = _values(graph), {output: node for node in graph.node for output in node.output}
    made: list[Any] = []
    for node in graph.node:
        quantize = makers.get(node.input[0]) if node.op_type == "Clip" else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            made.append(node)
            continue
        scale, zero_point = (values[name] for name in quantize.input[1:3])
        low, high = (int(values[name]) for name in node.input[1:3])
        source, clamped = quantize.input[0], f"{node.output[0]}_clamped"
        if (low, high) == (int(zero_point), 255):
            made.append(helper.make_node("Relu", [source], [clamped], name=f"{quantize.name}.clamp"))
        else:
            names = []
            for which, code in (("low", low), ("high", high)):
                names.append(f"{clamped}_{which}")
                bound = np.float32((code - int(zero_point)) * scale)
                graph.initializer.append(numpy_helper.from_array(np.array(bound, np.float32), names[-1]))
            made.append(helper.make_node("Clip", [source, *names], [clamped], name=f"{quantize.name}.clamp"))
        again = helper.make_node(
            "QuantizeLinear", [clamped, *quantize.input[1:]], [node.output[0]], name=f"{quantize.name}.clamped"
        )
        made.append(again)
    read = {name for node in made for name in node.input} | {output.name for output in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in made if set(node.output) & read)
    del graph.value_info[:]  # the checker infers them again


def _around_zero(graph: onnx.GraphProto) -> None:
    """Make codes int8 with zero point 0, in place."""
    from onnx import numpy_helper

    values = _values(graph)
    zeros: dict[tuple[int, ...], str] = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero_point = values[node.input[2]]
        middle = _MIDDLE if zero_point.dtype == np.uint8 else 0
        if (zero_point != middle).any():
            raise RunError(
                f"format=tensorrt takes zero points of 0 only, and that of {node.name.removesuffix('.quantize')} is "
                f"{int(zero_point.flat[np.argmax(zero_point != middle)]) - middle}: quantize with "
                "qconfig.activation.scheme=symmetric and qconfig.weight.scheme=symmetric."
            )
        if zero_point.shape not in zeros:
            zeros[zero_point.shape] = "zero_" + "x".join(map(str, zero_point.shape))
            zero = np.zeros(zero_point.shape, np.int8)
            graph.initializer.append(numpy_helper.from_array(zero, zeros[zero_point.shape]))
        node.input[2] = zeros[zero_point.shape]
    _drop_unread(graph)


def _without_quantization(graph: onnx.GraphProto) -> dict[str, float]:
    """Take quantize and dequantize operators out, in place, and weights into float. Returns the scales of tensors."""
    from onnx import numpy_helper

    values, scales, names = _values(graph), dict[str, float](), dict[str, str]()
    kept: list[Any] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            tensor = names.get(node.input[0], node.input[0])
            names[node.output[0]] = tensor
            scales.setdefault(tensor, float(values[node.input[1]]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in values:
            codes, scale = values[node.input[0]], values[node.input[1]]
            weight = codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))
            graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), node.output[0]))
        elif node.op_type == "DequantizeLinear":
            names[node.output[0]] = names[node.input[0]]
        else:
            kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for output in graph.output:
        if (tensor := names.get(output.name)) is not None:
            for node in kept:
                node.output[:] = [output.name if name == tensor else name for name in node.output]
                node.input[:] = [output.name if name == tensor else name for name in node.input]
            scales = {output.name if name == tensor else name: scale for name, scale in scales.items()}
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unread(graph)
    return scales


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [one for one in graph.initializer if one.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
