"""The INT8 kernels that a run's runtimes execute, and a probe of those that aren't torch's.

As `quantize.saturation.kernels` probes torch's: each kind of layer, with activations of 255 and weights of 127, where
the exact answer is the code 200.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qexp.config.schema import Config, Engine, RuntimeName, Target
from qexp.quantize.saturation import kernels
from qexp.quantize.saturation.kernels import EXACT, Kernels, probed_layers
from qexp.records import Precision
from qexp.runtimes import RUNTIMES
from qexp.runtimes.onnx_file import INPUT, OPSET, OnnxRuntime

_SIZE = 8  # rows and columns of the images
_CHANNELS = max(channels for channels, *_ in probed_layers().values())


def asked_for(config: Config) -> tuple[Kernels, ...]:
    """The kernels that execute the run's INT8 model: torch's, where it has some, and those of each runtime that has
    its own. None where it is simulated."""
    by_torch = config.flow.executed_by_torch and not config.qconfig.simulated
    return (*[of_torch(config)] * by_torch, *elsewhere(config))


def of_torch(config: Config) -> Kernels:
    """torch's kernels, of the run's engine."""
    return Kernels(f"engine={config.engine}", config.engine, *_overflowing(config, config.engine), of_torch=True)


def _overflowing(config: Config, engine: Engine) -> tuple[frozenset[str], frozenset[str]]:
    """The kinds of layer that can overflow in an engine of torch's, on this CPU and on the target."""
    qconfig, signature = config.qconfig, kernels.probe()
    return (
        kernels.overflowing_kinds(qconfig, engine, config.flow, Target.native, signature),
        kernels.overflowing_kinds(qconfig, engine, config.flow, config.target, signature),
    )


def elsewhere(config: Config) -> tuple[Kernels, ...]:
    """Those of each runtime that has its own."""
    found = []
    for name in config.runtimes:
        runtime = RUNTIMES[name]
        if isinstance(runtime, OnnxRuntime) and runtime.executes(config.flow, Precision.int8):
            here = kernels.saturating(probe(name))
            there = {Target.native: here, Target.avx2: runtime.saturates_on_avx2, Target.vnni: frozenset[str]()}
            found.append(Kernels(name, runtime.sums_as, here, there[config.target]))
        elif runtime.kernels_of is not None and runtime.executes(config.flow, Precision.int8):
            found.append(Kernels(name, runtime.kernels_of, *_overflowing(config, runtime.kernels_of)))
    return tuple(found)


def of(config: Config, runtime: str) -> Kernels:
    """Those that a runtime executes; without any kind of layer that can overflow where it only simulates."""
    if config.qconfig.simulated:
        return Kernels(runtime, config.engine, frozenset(), frozenset())
    return next((one for one in elsewhere(config) if one.name == runtime), of_torch(config))


@cache
def probe(name: RuntimeName) -> Mapping[str, int]:
    """The output code of a runtime's kernel for each kind of layer that is probed (tens of ms, once a process)."""
    runtime = RUNTIMES[name]
    assert isinstance(runtime, OnnxRuntime)
    images = np.full((1, _CHANNELS, _SIZE, _SIZE), 255, np.float32)
    with tempfile.TemporaryDirectory(prefix="qexp-probe-") as folder:
        outputs = runtime.outputs(_write(Path(folder) / "probe.onnx"), images)
    return {kind: _lowest(kind, outputs[kind]) for kind in probed_layers()}


def _lowest(kind: str, output: np.ndarray) -> int:
    """The lowest code, of convolutions without the borders, where products with padding are 0."""
    border = probed_layers()[kind][2] // 2
    inner = output[..., border : -border or None, border : -border or None] if output.ndim == 4 else output
    return round(float(inner.min()) / _scale(kind))


def _terms(kind: str) -> int:
    channels, _, size, groups = probed_layers()[kind]
    return channels // groups * max(size, 1) ** 2


def _scale(kind: str) -> float:
    """The scale of the output, with which the sum of all products is the code `EXACT`."""
    return _terms(kind) * 255 * 127 / EXACT


def _write(path: Path) -> Path:
    """Save a file with each layer between quantize and dequantize operators: from images, float32 [n, channels, 8, 8],
    to outputs with the names of the kinds."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: object, dtype: type) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    one, zero = constant("one", 1, np.float32), constant("zero", 0, np.uint8)
    zero_of_weights = constant("zero_of_weights", 0, np.int8)
    first, channels_axis = constant("first", [0], np.int64), constant("channels_axis", [1], np.int64)
    pooled = add("ReduceMean", [INPUT, constant("pooled_axes", [2, 3], np.int64)], "pooled", keepdims=0)
    for kind, (channels_in, channels_out, size, groups) in probed_layers().items():
        last = constant(f"{kind}.channels", [channels_in], np.int64)
        inputs = add("Slice", [INPUT if size else pooled, first, last, channels_axis], f"{kind}.images")
        codes = add("QuantizeLinear", [inputs, one, zero], f"{kind}.codes")
        shape = (channels_out, channels_in // groups, *[size] * 2 * bool(size))
        weight = constant(f"{kind}.weight", np.full(shape, 127), np.int8)
        operands = [
            add("DequantizeLinear", [codes, one, zero], f"{kind}.values"),
            add("DequantizeLinear", [weight, one, zero_of_weights], f"{kind}.weights"),
        ]
        if size:
            output = add("Conv", operands, f"{kind}.sums", group=groups, pads=[size // 2] * 4)
        else:
            output = add("Gemm", operands, f"{kind}.sums", transB=1)
        scale = constant(f"{kind}.scale", _scale(kind), np.float32)
        requantized = add("QuantizeLinear", [output, scale, zero], f"{kind}.requantized")
        add("DequantizeLinear", [requantized, scale, zero], kind)
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", _CHANNELS, _SIZE, _SIZE])
    outputs = [helper.make_tensor_value_info(kind, TensorProto.FLOAT, None) for kind in probed_layers()]
    graph = helper.make_graph(nodes, "probe", [images], outputs, constants)
    # The oldest version of the format with this opset, since runtimes may know no newer one.
    version = helper.find_min_ir_version_for([helper.make_opsetid("", OPSET)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=version)
    path.write_bytes(made.SerializeToString())
    return path
