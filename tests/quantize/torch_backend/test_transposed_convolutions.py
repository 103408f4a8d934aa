"""Transposed convolutions: INT8 where torch's kernels are right, FP32 where they aren't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import ActivationObserver, Engine, FlowName, Observer
from qexp.quantize import FLOWS
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.quantize.torch_backend.transposed_convolutions import why_float
from tests.helpers.quantizable import settings, spec, trained

# in, out, kernel, stride, padding, output_padding, groups
SHAPES = [
    (8, 8, 2, 2, 0, 0, 1),
    (16, 8, 2, 2, 0, 0, 1),
    (16, 16, (2, 4), (2, 2), 0, 0, 1),
    (16, 16, 2, 1, 0, 0, 1),
    (8, 8, 2, 2, 0, 0, 2),
    (6, 6, 2, 2, 0, 0, 1),
    (16, 8, 3, 2, 1, 1, 1),
    (8, 8, 3, 2, 1, 1, 1),
    (16, 8, 4, 2, 1, 0, 1),
    (8, 8, 4, 2, 1, 0, 1),
    (6, 12, 3, 1, 1, 0, 2),
    (8, 8, 3, 3, 0, 0, 8),
    (16, 8, 1, 1, 0, 0, 1),
]


class Decoder(nn.Module):
    def __init__(self, functional: bool, *shape: Any) -> None:
        super().__init__()
        channels_in, channels_out, kernel, stride, padding, output_padding, groups = shape
        self.conv, self.functional = nn.Conv2d(3, channels_in, 3, padding=1), functional
        self.up = nn.ConvTranspose2d(channels_in, channels_out, kernel, stride, padding, output_padding, groups)
        self.norm, self.relu = nn.BatchNorm2d(channels_out), nn.ReLU()
        self.head = nn.Conv2d(channels_out, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.functional:
            up = self.up
            weight, more = up.weight, (up.stride, up.padding, up.output_padding, up.groups)
            x = F.conv_transpose2d(x, weight, up.bias, *more)
        else:
            x = self.up(x)
        return self.head(self.relu(self.norm(x)))


def sqnr_db(net: nn.Module, flow: FlowName, engine: Engine) -> tuple[float, tuple[Any, ...]]:
    """The INT8 model's signal to noise ratio against the float model in float64, on the calibration images."""
    images = torch.rand(8, 3, 6, 5)
    # 7 bits of weights: nothing saturates on any machine.
    qconfig, observer = settings(weight_bits=7), Observer(ActivationObserver.minmax)
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), images), spec(qconfig, observer, engine), images)
    quantize.calibrate(prepared, [images])
    int8 = FLOWS[flow].convert(prepared).module
    expected = net.double()(images.double())
    with quantize.engine(engine), torch.inference_mode():
        # Wrong kernels are wrong at random: the worst of some calls counts.
        noise = max(float((int8(images) - expected).square().sum()) for _ in range(3))
    return 10 * float(torch.log10(expected.square().sum() / noise)), torch_layers.layers(int8, FLOWS[flow], engine)


@pytest.mark.parametrize(
    ("flow", "functional", "engine"),
    # A function becomes a module before anything depends on the engine.
    [
        *((flow, False, engine) for flow in (FlowName.eager, FlowName.fx) for engine in Engine),
        (FlowName.fx, True, Engine.x86),
    ],
)
def test_a_transposed_convolution_gives_what_it_gives_in_float(
    flow: FlowName, functional: bool, engine: Engine
) -> None:
    for seed, shape in enumerate(SHAPES):
        torch.manual_seed(seed)
        net = trained(Decoder(functional, *shape))
        reason = why_float(net.up, engine)
        found, layers = sqnr_db(net, flow, engine)
        # Right ones have 24 to 40 dB, wrong ones less than 5.
        assert found > 18, shape
        [up] = [layer for layer in layers if layer.kind == "conv_transpose"]
        assert (up.name, up.int8, up.reason) == ("up", not reason, reason)


def test_each_engine_keeps_some_in_int8_and_none_is_left_in_float_without_reason() -> None:
    wrong = {engine: [shape for shape in SHAPES if why_float(Decoder(False, *shape).up, engine)] for engine in Engine}
    assert not wrong[Engine.qnnpack]
    assert wrong[Engine.fbgemm] == SHAPES[:4]
    assert set(wrong[Engine.onednn]) == {s for s in SHAPES if s[0] != s[1] or s[5]}
    assert set(wrong[Engine.x86]) == {s for s in SHAPES if (s[0] != s[1] and not s[5]) or s in SHAPES[:4]}


def test_a_model_with_a_layer_in_float_is_saved_and_read_back(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, images = trained(Decoder(False, *SHAPES[1])), torch.rand(4, 3, 6, 5)
    qconfig, observer = settings(weight_bits=7), Observer(ActivationObserver.minmax)
    fused = FLOWS[FlowName.eager].fuse(net, spec(), images)
    prepared = FLOWS[FlowName.eager].prepare(fused, spec(qconfig, observer), images)
    quantize.calibrate(prepared, [images])
    int8 = FLOWS[FlowName.eager].convert(prepared).module
    skeleton = quantize.skeleton(fused, FLOWS[FlowName.eager], spec(qconfig), images)
    with quantize.engine(Engine.x86), torch.inference_mode():
        skeleton.load_state_dict(int8.state_dict(), assign=True)
        assert torch.equal(skeleton(images), int8(images))
