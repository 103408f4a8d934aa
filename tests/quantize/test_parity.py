"""INT8 logits of qexp against a direct use of torch.ao.quantization, written out here: equal bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfigMapping,
    default_fixed_qparams_range_0to1_observer,
    fuse_modules,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import convert as torch_convert
from torch.ao.quantization import prepare as torch_prepare
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from qexp import quantize
from qexp.config.schema import ActivationObserver, Engine, FlowName, Observer, QConfig
from qexp.quantize import FLOWS
from tests.helpers.quantizable import MINMAX, Plain, StubbedTiny, images, settings, spec, trained

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min and quant_max"
)

WEIGHTS = {
    "per_tensor": MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
    "per_channel": PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
}
ACTIVATIONS = {
    "minmax": (MinMaxObserver, MINMAX),
    "moving_average": (MovingAverageMinMaxObserver, Observer(ActivationObserver.moving_average, 0.05)),
    "histogram": (HistogramObserver, Observer(ActivationObserver.histogram, bins=512)),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "minmax": {},
    "moving_average": {"averaging_constant": 0.05},
    "histogram": {"bins": 512},
}
BATCHES = images(24, seed=1).split(8)
TEST_IMAGES = images(8, seed=2)


def directly_eager(net: nn.Module, qconfig: TorchQConfig, engine: str) -> Tensor:
    """The tutorial's ten lines, on a net of qexp's that has stubs."""
    torch.backends.quantized.engine = engine
    net = copy.deepcopy(net).eval()
    fuse_modules(net, ["conv1", "bn1", "relu"], inplace=True)
    for block in net.blocks:
        fuse_modules(block, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]], inplace=True)
        if block.downsample is not None:
            fuse_modules(block.downsample, ["0", "1"], inplace=True)
    net.qconfig = qconfig
    prepared = torch_prepare(net)
    with torch.inference_mode():
        for batch in BATCHES:
            prepared(batch)
        return torch_convert(prepared)(TEST_IMAGES)


def directly_fx(net: nn.Module, mapping: QConfigMapping, engine: str) -> Tensor:
    torch.backends.quantized.engine = engine
    prepared = prepare_fx(copy.deepcopy(net).eval(), mapping, (TEST_IMAGES,))
    with torch.inference_mode():
        for batch in BATCHES:
            prepared(batch)
        return convert_fx(prepared)(TEST_IMAGES)


def by_qexp(net: nn.Module, flow: FlowName, qconfig: QConfig, observer: Observer, engine: str) -> Tensor:
    name, example = Engine(engine), TEST_IMAGES[:2]
    fused = FLOWS[flow].fuse(net, spec(), example)
    prepared = FLOWS[flow].prepare(fused, spec(qconfig, observer, name), example)
    quantize.calibrate(prepared, BATCHES)
    converted = FLOWS[flow].convert(prepared).module
    with quantize.engine(name), torch.inference_mode():
        return converted(TEST_IMAGES)


@pytest.fixture(autouse=True)
def engine_restored() -> Any:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


def eager_net() -> nn.Module:
    # 16 channels: with 8, oneDNN's own outputs change from call to call
    # (see qexp/quantize/torch_backend/stride_bugs.py).
    return trained(StubbedTiny(width=16))


@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn"])
@pytest.mark.parametrize("observer", list(ACTIVATIONS))
@pytest.mark.parametrize("granularity", list(WEIGHTS))
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_int8_logits_equal_torch_bit_for_bit(flow: FlowName, granularity: str, observer: str, engine: str) -> None:
    kind, ours = ACTIVATIONS[observer]
    activation = kind.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_affine, **PARAMETERS[observer])
    direct = TorchQConfig(activation=activation, weight=WEIGHTS[granularity])
    qconfig = settings(granularity, range_after_clamp=False)
    if flow is FlowName.eager:
        net = eager_net()
        expected = directly_eager(net, direct, engine)
    else:
        net = trained(Plain())
        expected = directly_fx(net, get_default_qconfig_mapping("x86").set_global(direct), engine)
    actual = by_qexp(net, flow, qconfig, ours, engine)
    assert expected.std() > 0
    assert not torch.equal(expected, net(TEST_IMAGES))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_default_qconfig_of_torch_is_one_of_ours(engine: str, flow: FlowName) -> None:
    # What torch calls reduce_range is overflow=activations here: the same grid, without its warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = get_default_qconfig(engine)
        reduced = default.activation().quant_max == 127
        if flow is FlowName.eager:
            net = eager_net()
            expected = directly_eager(net, default, engine)
        else:
            net = trained(Plain())
            expected = directly_fx(net, get_default_qconfig_mapping(engine), engine)
    qconfig = settings(
        "per_tensor" if engine == "qnnpack" else "per_channel",
        overflow="activations" if reduced else "none",
        range_after_clamp=False,
    )
    actual = by_qexp(net, flow, qconfig, Observer(ActivationObserver.histogram, bins=2048), engine)
    assert torch.equal(actual, expected)


FURTHER: dict[str, tuple[QConfig, Callable[[], TorchQConfig]]] = {
    "symmetric activations": (
        settings(activation_scheme="symmetric", range_after_clamp=False),
        lambda: TorchQConfig(
            MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_symmetric), WEIGHTS["per_channel"]
        ),
    ),
    "weights in half their range": (
        settings(overflow="weights", range_after_clamp=False),
        lambda: TorchQConfig(
            MinMaxObserver.with_args(dtype=torch.quint8),
            PerChannelMinMaxObserver.with_args(
                dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-64, quant_max=63
            ),
        ),
    ),
    "activations in half their range": (
        settings("per_tensor", overflow="activations", range_after_clamp=False),
        lambda: TorchQConfig(MinMaxObserver.with_args(dtype=torch.quint8, reduce_range=True), WEIGHTS["per_tensor"]),
    ),
    "asymmetric weights": (
        settings("per_channel", weight_scheme="asymmetric", range_after_clamp=False),
        lambda: TorchQConfig(
            MinMaxObserver.with_args(dtype=torch.quint8),
            PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_affine),
        ),
    ),
}


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
@pytest.mark.parametrize("case", list(FURTHER))
def test_other_schemes_and_guards_equal_torch_bit_for_bit(case: str, engine: str) -> None:
    qconfig, direct = FURTHER[case]
    net = eager_net()
    expected = directly_eager(net, direct(), engine)
    assert torch.equal(by_qexp(net, FlowName.eager, qconfig, MINMAX, engine), expected)


def test_fixed_ranges_of_sigmoid_are_kept() -> None:
    class Gate(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return self.fc((x * torch.sigmoid(x)).mean((2, 3)))

    net = trained(Gate())
    observer = MinMaxObserver.with_args(dtype=torch.quint8)
    mapping = get_default_qconfig_mapping("x86").set_global(TorchQConfig(observer, WEIGHTS["per_channel"]))
    assert mapping.object_type_qconfigs[torch.sigmoid].activation is default_fixed_qparams_range_0to1_observer
    expected = directly_fx(net, mapping, "x86")
    assert torch.equal(by_qexp(net, FlowName.fx, settings(range_after_clamp=False), MINMAX, "x86"), expected)
