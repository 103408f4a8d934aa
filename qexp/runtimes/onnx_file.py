"""A model as an ONNX file, which ONNX Runtime and OpenVINO read: its Q/DQ program, exported by torch.

Weights are INT8 initializers, the batch size is open, and paddings are in the convolutions, which torch's exporter sees
to. Each QuantizeLinear node has the name of the tensor that it quantizes.
"""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qexp.config.schema import Engine
from qexp.errors import RunError, first_line
from qexp.quantize import qdq
from qexp.records import Precision
from qexp.runtimes.base import Runtime
from qexp.system.quiet import quiet

if TYPE_CHECKING:
    import onnx

OPSET = 21
"""The first in which INT8 tensors can be quantized with any of ONNX's types, and what all of the runtimes read."""
INPUT, OUTPUT, BATCH = qdq.INPUT, "logits", "batch"

_COMMON = {
    *("quantize_per_tensor.default", "dequantize_per_tensor.default", "dequantize_per_channel.default"),
    *("add.Scalar", "add.Tensor", "avg_pool2d.default", "cat.default", "clamp.default", "conv2d.default"),
    *("div.Tensor", "hardsigmoid.default", "hardswish.default", "leaky_relu.default", "linear.default"),
    *("max_pool2d.default", "mean.dim", "mul.Scalar", "mul.Tensor", "permute.default", "relu.default"),
    *("reshape.default", "sigmoid.default", "silu.default", "slice.Tensor", "split.Tensor", "squeeze.dim"),
    *("sym_size.int", "tanh.default", "transpose.int", "unsqueeze.default", "upsample_nearest2d.default"),
}  # fmt: skip
"""Operators that torch's exporter writes and both runtimes take, as the tests' networks show."""


class OnnxRuntime(Runtime):
    """A runtime that reads the ONNX file.

    sums_as: torch's engine whose kernels add up in the same order; saturates_on_avx2: the kinds of layer (see
    `kernels.KINDS`) in which 16-bit accumulators can overflow on a CPU without VNNI.
    """

    reads_program = True
    rounds_otherwise = True
    sums_as: Engine
    saturates_on_avx2: frozenset[str]

    def unavailable(self) -> str | None:
        missing = self.name.missing
        if not missing:
            return None
        which = f"the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
        return f"it needs {which}: pip install 'qexp[{self.name}]'"

    def version(self) -> str:
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in self.name.packages)

    def takes(self, program: fx.Graph) -> bool:
        return all(map(_is_common, program.nodes))

    def tolerance(self, precision: Precision, all_int8: bool) -> float:
        """As in the base class, but for sums in FP32 of another library's kernels."""
        return 1e-3 if precision is Precision.fp32 else super().tolerance(precision, all_int8)

    def file(self, precision: Precision) -> str:
        return f"{precision}.onnx"

    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        return write(model, example, path)

    def codes(self, model: nn.Module, path: Path, images: Tensor) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory(prefix="qexp-codes-") as folder:
            everything = with_codes(path, Path(folder) / path.name)
            return list(self.outputs(everything, images.numpy()).values())[1:]

    @abstractmethod
    def outputs(self, path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
        """The file's outputs by their names, in their order, for images, float32 [n, 3, H, W]."""


def write(model: nn.Module, example: Tensor, path: Path) -> Path:
    """Save a converted or float model. example: float32 [n, 3, H, W]; for INT8, torch's engine must be set.

    Raises RunError, which names the module, where an operator has no counterpart in ONNX.
    """
    import onnx

    example = torch.cat([example[:1], example[:1]])  # one image would be taken for a batch size that is fixed
    exported = qdq.exported(qdq.program(model, example), example)
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        try:
            made: Any = torch.onnx.export(
                exported, (example,), input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, dynamo=True,
                optimize=True, verbose=False,
            )  # fmt: skip
        except (torch.onnx.OnnxExporterError, RuntimeError, NotImplementedError) as error:
            raise RunError(_refusal(error, exported.graph)) from error
    proto = made.model_proto
    _tidy(proto, qdq.tensors(exported.graph))
    onnx.checker.check_model(proto, full_check=True)  # shapes are inferred, and compared with those written
    path.write_bytes(proto.SerializeToString())
    return path


def _tidy(proto: onnx.ModelProto, tensors: list[str]) -> None:
    """Name nodes and the batch size, and drop what the exporter notes of torch's graph, in place.

    tensors: names of what each QuantizeLinear node quantizes, in their order.
    """
    graph = proto.graph
    quantizing = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    makers = {output: node for node in graph.node for output in node.output}
    if len(quantizing) == len(tensors):
        taken: Counter[str] = Counter()  # a module may be called several times, and ONNX Runtime takes each name once
        for node, tensor in zip(quantizing, tensors, strict=True):
            maker = makers.get(node.input[0])
            name = tensor or (maker.op_type.lower() if maker is not None else INPUT)
            unique = f"{name}_{taken[name]}" if taken[name] else name
            taken[name] += 1
            node.name = f"{unique}.quantize"
            if maker is not None:
                maker.name = unique
    _unshare_grids(graph, makers)
    _reduce_maps(graph)
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = dim.dim_param.replace(symbol, BATCH)


def _reduce_maps(graph: onnx.GraphProto) -> None:
    """Write means and sums of tensors of three dimensions as those of maps, of four, in place.

    Where OpenVINO (2026.4) fuses a dequantization or a product with constants with a reduction of three dimensions, it
    answers for several images with memory that nothing was written to.
    """
    from onnx import numpy_helper

    ranks = {one.name: len(one.type.tensor_type.shape.dim) for one in (*graph.input, *graph.value_info)}
    values = {one.name: one for one in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        reduces = node.op_type in ("ReduceMean", "ReduceSum") and ranks.get(node.input[0]) == 3
        axes = values.get(node.input[1]) if reduces and len(node.input) > 1 else None
        over = [] if axes is None else sorted(int(axis) % 3 for axis in numpy_helper.to_array(axes).ravel())
        nodes += [node] if over not in ([1], [2], [1, 2]) else _reduced_map(graph, node, over)
    del graph.node[:]
    graph.node.extend(nodes)


def _reduced_map(graph: onnx.GraphProto, node: onnx.NodeProto, over: list[int]) -> list[onnx.NodeProto]:
    """The nodes in place of a reduction of three dimensions, over the last, that before it, or both."""
    from onnx import helper, numpy_helper

    made: list[onnx.NodeProto] = []

    def then(op: str, axes: Sequence[int] = (), **attributes: Any) -> None:
        source = made[-1].output[0] if made else node.input[0]
        operands = [source]
        if axes:
            operands.append(f"axes{''.join(map(str, axes))}")
            if operands[1] not in {one.name for one in graph.initializer}:
                graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), operands[1]))
        name = f"{node.name or node.output[0]}.{len(made)}"
        made.append(helper.make_node(op, operands, [f"{node.output[0]}.{len(made)}"], name, **attributes))

    keeps = next((one.i for one in node.attribute if one.name == "keepdims"), 1)
    if over == [1]:
        then("Transpose", perm=[0, 2, 1])
    then("Unsqueeze", [1] if over == [1, 2] else [3])
    then(node.op_type, [2, 3], keepdims=1)
    made[-1].name = node.name
    then("Squeeze", [3] if keeps else [1, 2, 3] if over == [1, 2] else [2, 3])
    if keeps and over == [1]:
        then("Transpose", perm=[0, 2, 1])
    made[-1].output[0] = node.output[0]
    return made


def _unshare_grids(graph: onnx.GraphProto, makers: dict[str, onnx.NodeProto]) -> None:
    """Give each quantized tensor a scale and a zero point of its own, in place.

    The exporter writes equal ones once. OpenVINO (2026.4), where it moves a dequantization behind a sum, multiplies its
    zero point in place, and with it that of every other tensor that reads it.

    makers: the node that computes each tensor.
    """
    values = {one.name: one for one in graph.initializer}
    own: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        maker: onnx.NodeProto | None = node
        if node.op_type == "DequantizeLinear":
            maker = makers.get(node.input[0])
            while maker is not None and maker.op_type == "Clip":
                maker = makers.get(maker.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            continue
        for position, kind in ((1, "scale"), (2, "zero_point")):
            name, value = f"{maker.name.removesuffix('.quantize') or maker.output[0]}.{kind}", node.input[position]
            if value in values:
                own.setdefault(name, type(values[value])()).CopyFrom(values[value])
                own[name].name = node.input[position] = name
    read = {name for node in graph.node for name in node.input}
    kept = [one for one in graph.initializer if one.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *own.values()])


def _is_common(node: fx.Node) -> bool:
    if node.target is torch.ops.aten._adaptive_avg_pool2d.default:
        return all(size == 1 for size in node.args[1])  # type: ignore[union-attr]
    return not isinstance(node.target, torch._ops.OpOverload) or str(node.target).partition(".")[2] in _COMMON


def with_codes(path: Path, to: Path) -> Path:
    """Save a copy of the file whose outputs are, behind the logits, the codes of each QuantizeLinear node, uint8."""
    import onnx

    proto = onnx.load(str(path))
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            proto.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UINT8, None))
    to.write_bytes(proto.SerializeToString())
    return to


def _refusal(error: BaseException, graph: fx.Graph) -> str:
    """A sentence for the first of the errors that led to this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    named = re.search(r"OpOverload\(op='(.+?)', overload='(.+?)'\)", str(error))
    if named is None:
        return f"torch can't write the model as ONNX: {first_line(error)}"
    operator = ".".join(named.groups())
    where = qdq.place_of(operator, graph) or "the model"
    return f"{where} executes {operator}, which has no counterpart in ONNX"
