"""The flow pt2e: parity with a direct use of torchao, where it quantizes, and networks of many kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")

from qexp import quantize
from qexp.config.schema import ActivationObserver, FlowName, Observer, Placement, QConfig
from qexp.errors import InputError, RunError
from qexp.models.float_model import Logits
from qexp.quantize import FLOWS, QuantizedModel, qdq
from qexp.quantize.graph.exported import exported
from qexp.runtimes import RUNTIMES
from tests.helpers import networks
from tests.helpers.quantizable import MINMAX, Chain, Plain, images, settings, spec, trained

FLOW = FLOWS[FlowName.pt2e]
CALIBRATION = images(24, seed=1).split(8)
EVERY_OP, LAYERS = Placement.every_op, Placement.layers


def quantized(
    net: nn.Module, qconfig: QConfig, batches: Any = CALIBRATION, observer: Observer = MINMAX
) -> QuantizedModel:
    settled = spec(qconfig, observer)
    prepared = FLOW.prepare(FLOW.fuse(net, settled, batches[0]), settled, batches[0])
    quantize.calibrate(prepared, batches)
    return FLOW.convert(prepared)


def targets(module: Any) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


# ------------------------------------------------------------------------------------------------ parity

OBSERVERS = {
    "minmax": ("MinMaxObserver", {}, MINMAX),
    "moving_average": (
        "MovingAverageMinMaxObserver",
        {"averaging_constant": 0.05},
        Observer(ActivationObserver.moving_average, 0.05),
    ),
}


def directly(net: nn.Module, granularity: str, kind: str, parameters: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The ten lines of torchao's tutorial, with its own quantizer for x86: scales and zero points, sorted."""
    from torchao.quantization.pt2e import observer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

    activation = QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=getattr(observer, kind).with_args(**parameters),
        qscheme=torch.per_tensor_affine,
    )
    per_channel = granularity == "per_channel"
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=observer.PerChannelMinMaxObserver if per_channel else observer.MinMaxObserver,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
    )
    program = torch.export.export(net, (CALIBRATION[0],), strict=True).module(check_guards=False)
    quantizer = X86InductorQuantizer().set_global(QuantizationConfig(activation, None, weight, None))
    prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch in CALIBRATION:
            prepared(batch)
    return grids(convert_pt2e(prepared))


def grids(module: Any) -> list[tuple[Any, Any]]:
    """Scales and zero points of all dequantize operators, each once, sorted."""

    def value(one: Any) -> tuple[float, ...]:
        if isinstance(one, torch.fx.Node):
            one = module.get_buffer(str(one.target))
        return tuple(torch.as_tensor(one, dtype=torch.float64).flatten().tolist())

    nodes = [node for node in module.graph.nodes if ".dequantize_" in str(node.target)]
    return sorted({(value(node.args[1]), value(node.args[2])) for node in nodes})


class Averaged(Plain):
    """Without a pooling operator, which torchao's quantizer quantizes, too, where a linear layer follows."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.pointwise(F.relu(self.bn2(self.depthwise(x))))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_scales_and_zero_points_equal_torchaos_bit_for_bit(granularity: str, observer: str) -> None:
    net = trained(Averaged())
    kind, parameters, ours = OBSERVERS[observer]
    expected = directly(net, granularity, kind, parameters)
    found = quantized(net, replace(settings(granularity), placement=LAYERS), observer=ours)
    assert len(expected) == 2 * len(found.layers)
    assert grids(found.module) == expected


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_every_op_has_torchaos_grids_and_those_of_its_observers_elsewhere(granularity: str, observer: str) -> None:
    net = trained(Averaged())
    kind, parameters, ours = OBSERVERS[observer]
    torchaos = set(directly(net, granularity, kind, parameters))
    found = set(grids(quantized(net, settings(granularity), observer=ours).module))
    assert torchaos < found
    assert found - torchaos <= everywhere(net, kind, parameters)
    assert len(found - torchaos) == 3  # what no layer reads: the last convolution's output, the sum and the logits


def everywhere(net: nn.Module, kind: str, parameters: dict[str, Any]) -> set[tuple[Any, Any]]:
    """The grid that an observer of torchao's gives to each tensor of the float graph."""
    from torchao.quantization.pt2e import observer

    made = partial(getattr(observer, kind), dtype=torch.uint8, qscheme=torch.per_tensor_affine, **parameters)
    observers: dict[str, Any] = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and n.op in ("placeholder", "call_function"):
                observers.setdefault(n.name, made())(out)
            return out

    graph = exported(net, CALIBRATION[0])
    with torch.no_grad():
        for batch in CALIBRATION:
            Watched(graph).run(batch)
    qparams = [one.calculate_qparams() for one in observers.values()]
    return {tuple(tuple(value.double().flatten().tolist()) for value in one) for one in qparams}  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ where it quantizes


class Block(nn.Module):
    """A convolution with ReLU6, pooling, a sum and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 2, padding="same")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.conv2(x) + x)
        return self.fc(x.mean((2, 3)).view(-1, 8))


def test_every_op_quantizes_inputs_and_outputs_behind_their_clamps() -> None:
    found = quantized(trained(Block()), settings())
    assert set(found.qparams) == {
        "x", "conv1.weight", "conv1", "max_pool2d", "conv2.weight", "conv2", "add", "mean", "reshape", "fc.weight",
        "fc",
    }  # fmt: skip
    one = found.qparams
    assert one["conv1"].scale == one["max_pool2d"].scale
    assert one["conv1"].scale[0] * 255 == pytest.approx(6, abs=0.05)  # ReLU6 ends the range
    assert one["conv2"].zero_point[0] > 0  # no clamp follows it


def test_the_table_of_tensors_says_where_each_range_was_taken() -> None:
    assert quantized(trained(Block()), settings()).ranges_taken == {
        "x": "output", "conv1": "after relu6", "max_pool2d": "output", "conv2": "output", "add": "after relu",
        "mean": "output", "reshape": "output", "fc": "output",
    }  # fmt: skip
    wide = quantized(trained(Block()), settings(range_after_clamp=False)).ranges_taken
    assert wide["conv1"] == "output"
    layers = quantized(trained(Block()), replace(settings(), placement=LAYERS)).ranges_taken
    assert layers == {"x": "output", "max_pool2d": "output", "reshape": "output"}


def test_layers_quantizes_what_goes_into_layers_alone() -> None:
    found = quantized(trained(Block()), replace(settings(), placement=LAYERS))
    assert sorted(found.qparams) == ["conv1.weight", "conv2.weight", "fc.weight", "max_pool2d", "reshape", "x"]
    assert targets(found.module).count("quantized_decomposed.quantize_per_tensor.default") == 3
    assert [layer.name for layer in found.layers if layer.int8] == ["conv1", "conv2", "fc"]


def test_a_range_before_the_clamp_holds_what_the_clamp_cuts() -> None:
    wide = quantized(trained(Block()), settings(range_after_clamp=False)).qparams["conv1"]
    assert wide.zero_point[0] > 0


def test_fewer_bits_are_clamps_of_codes_and_a_guard_is_none() -> None:
    few = quantized(trained(Block()), settings(activation_bits=4)).module
    clamps = [node.args[2] for node in few.graph.nodes if str(node.target) == "aten.clamp.default"]
    assert set(clamps) == {15}
    guarded = quantized(trained(Block()), settings(overflow="activations"))
    assert "aten.clamp.default" not in targets(guarded.module)
    assert guarded.qparams["x"].qmax == 255
    weights = quantized(trained(Block()), settings(overflow="weights")).module
    assert all(int(codes.abs().max()) <= 64 for name, codes in weights.named_buffers() if name.endswith("codes"))


def test_int8_weights_stand_alone() -> None:
    found = quantized(trained(Block()), settings())
    float_weights = [value for value in found.module.state_dict().values() if value.is_floating_point()]
    assert max(value.numel() for value in float_weights) <= 10  # biases and scales


def test_the_graph_holds_for_any_number_of_images_and_is_plain() -> None:
    net, batch = trained(Block()), images(5)
    graph = exported(net, batch)
    assert targets(graph) == [
        "aten.conv2d.default", "aten.relu6.default", "aten.max_pool2d.default", "aten.constant_pad_nd.default",
        "aten.conv2d.default", "aten.add.Tensor", "aten.relu.default", "aten.mean.dim", "aten.reshape.default",
        "aten.linear.default",
    ]  # fmt: skip
    with torch.inference_mode():
        assert quantize.difference(net(batch), graph(batch)) < 1e-5
        assert quantize.difference(net(batch[:1]), graph(batch[:1])) < 1e-5


def test_a_batch_norm_whose_layer_has_other_readers_stays() -> None:
    class Tapped(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.fc((self.bn1(y) + y).mean((2, 3)))

    net = trained(Tapped())
    found = quantized(net, settings())
    assert [layer.kind for layer in found.layers] == ["conv", "batchnorm", "linear"]
    with torch.inference_mode():
        expected = net(images())
        assert sqnr_db(expected, found.module(images()) - expected) > 15


# ------------------------------------------------------------------------------------------------ the check


def test_a_layer_that_computes_something_else_is_named() -> None:
    def changed(change: Callable[[Any], None]) -> QuantizedModel:
        found = quantized(trained(Block()), settings())
        change(found.module)
        return found

    def stride(module: Any) -> None:
        node = next(node for node in module.graph.nodes if node.name == "max_pool2d")
        node.args = (node.args[0], [2, 2], [1, 1])

    def weights(module: Any) -> None:
        codes = next(
            value for name, value in module.named_buffers() if name.startswith("fc") and name.endswith("codes")
        )
        codes[3, 3] = codes[3, 3] // 2 + 30

    def reads(module: Any) -> None:
        node = next(node for node in module.graph.nodes if node.name.startswith("add"))
        node.args = (node.args[1], node.args[1])

    quantize.check_layers(changed(lambda module: None), images(2))
    for change, name in ((stride, "max_pool2d"), (weights, "fc"), (reads, "add")):
        with pytest.raises(RunError, match=f"{name} reads another tensor"):
            quantize.check_layers(changed(change), images(2))


def test_errors_of_layers_are_those_of_their_tensors() -> None:
    net = trained(Block())
    found, batch = quantized(net, settings()), images(6, seed=3)
    rows = {row.name: row for row in quantize.layer_fidelity(found, [batch])}
    assert list(rows) == ["x", "conv1", "conv2", "add", "mean", "fc"]
    assert [row.kind for row in rows.values()] == ["quantize", "conv", "conv", "add", "mean", "linear"]
    with torch.inference_mode():
        expected, actual = net(batch), found.module(batch)
    assert rows["fc"].sqnr_db == pytest.approx(sqnr_db(expected, actual - expected), abs=1e-3)
    assert all(row.own_sqnr_db >= row.sqnr_db - 1 for row in rows.values())
    scale = found.qparams["x"].scale[0]
    exact = torch.fake_quantize_per_tensor_affine(batch, float(scale), int(found.qparams["x"].zero_point[0]), 0, 255)
    assert rows["x"].sqnr_db == pytest.approx(sqnr_db(batch, exact - batch), abs=1e-3)
    weight = net.fc.weight
    rounded = torch.fake_quantize_per_channel_affine(
        weight, torch.tensor(found.qparams["fc.weight"].scale), torch.zeros(10, dtype=torch.int32), 0, -128, 127
    )
    assert rows["fc"].weight_sqnr_db == pytest.approx(sqnr_db(weight, rounded - weight), abs=1e-3)


# ------------------------------------------------------------------------------------------------ many networks


def sqnr_db(signal: Tensor, noise: Tensor) -> float:
    return 10 * math.log10(float(signal.double().square().sum()) / max(float(noise.double().square().sum()), 1e-30))


REFUSED = {"Prototypes": "Not all values of batch"}
"""Networks that torch can't export, with words of the error."""


KINDS = (
    "Functional", "SqueezeExciteNet", "DenseNet", "Activations", "Rectifiers", "TransposedDecoder", "Paddings",
    "FlattenAndBack", "VisionTransformer", "WindowAttention", "GroupNormNet", "InPlace", "Gates",
    "PreActivationResNet", "ShuffleUnits", "ConvMixer", "GeneralisedMean", "ConditionalConv", "Prototypes",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_networks_of_many_kinds_go_through(name: str) -> None:
    """Rounding leaves at least 12 dB around every operator, and 15 where layers alone are quantized."""
    net, batch = networks.built(name), networks.images(32)
    calibration = networks.images(32, seed=1).split(16)
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            FLOW.fuse(net, spec(), batch)
        return
    with torch.inference_mode():
        expected = net(batch)
    signal = expected - expected.mean(dim=0)
    found = {}
    for placement in (EVERY_OP, LAYERS):
        int8 = quantized(net, replace(settings(), placement=placement), calibration)
        quantize.check_layers(int8, batch[:2])
        assert any(layer.int8 for layer in int8.layers)
        with torch.inference_mode():
            found[placement] = sqnr_db(signal, int8.module(batch) - expected)
    assert found[EVERY_OP] > 12
    assert found[LAYERS] > 15


class Several(Block):
    """Returns features beside its logits, in a tuple or a dictionary."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.bn1(self.conv1(x)))
        logits = self.fc(features.mean((2, 3)))
        return (features, logits) if self.kind is tuple else {"features": features, "logits": logits}


@pytest.mark.parametrize(("kind", "output"), [(tuple, 1), (dict, "logits")])
def test_logits_among_several_outputs_are_quantized(kind: type, output: int | str) -> None:
    net, batch = Logits(trained(Several(kind)), output).eval(), images(16, seed=3)
    with torch.inference_mode():
        expected = net(batch)
        for placement in (EVERY_OP, LAYERS):
            found = quantized(net, replace(settings(), placement=placement))
            assert [layer.kind for layer in found.layers if layer.int8] == ["conv", "linear"]
            assert sqnr_db(expected, found.module(batch) - expected) > 25


@pytest.mark.parametrize("placement", [EVERY_OP, LAYERS])
def test_runtimes_execute_the_program(placement: Placement, tmp_path: Path) -> None:
    net, batch = trained(Averaged()), images(16, seed=3)
    found = quantized(net, replace(settings(overflow="weights"), placement=placement))  # exact without VNNI, too
    with torch.inference_mode():
        expected, floats = found.module(batch).numpy(), net(batch).numpy()
    path = RUNTIMES["onnxruntime"].export(found.module, batch, tmp_path / "int8.onnx")
    assert path.stat().st_size < 20_000
    for name in ("onnxruntime", "openvino"):
        runtime: Any = RUNTIMES[name]
        int8 = runtime.load(path, lambda: net, None)(batch).numpy()
        assert np.square(int8 - expected).mean() <= 2 * np.square(expected - floats).mean()
    assert RUNTIMES["onnxruntime"].layers(path, batch.shape)[0] == (4 if placement is EVERY_OP else 1)  # type: ignore[attr-defined]


def test_a_clamp_within_the_grid_is_one_of_codes_which_onnxruntime_fuses(tmp_path: Path) -> None:
    net, batch = trained(Chain(nn.ReLU6)), images(16, seed=3)
    found = quantized(net, settings(overflow="activations"))  # whose grids end far beyond 6
    program = qdq.program(found.module, batch)
    assert "aten.relu6.default" not in targets(program)
    clamps = [node.args[1:] for node in program.graph.nodes if str(node.target) == "aten.clamp.default"]
    assert all(low == 0 and 127 <= high < 255 for low, high in clamps)
    assert len(clamps) == 3
    with torch.inference_mode():
        assert quantize.difference(found.module(batch), program(batch)) < 0.02
    path = RUNTIMES["onnxruntime"].export(found.module, batch, tmp_path / "int8.onnx")
    assert RUNTIMES["onnxruntime"].layers(path, batch.shape) == (4, 0)
