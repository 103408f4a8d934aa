"""The Q/DQ program computes what torch executes, up to rounding, and says so with explicit operators.

Against torch's kernels it runs with engine=qnnpack, whose sums are exact on every CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName, QConfig
from qexp.models import architectures
from qexp.quantize import FLOWS, QuantizedModel, qdq
from qexp.quantize.torch_backend.stride_bugs import AfterStride
from tests.helpers import networks
from tests.helpers.quantizable import Chain, Plain, images, settings, spec, trained

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
PASSING = {torch.ops.aten.reshape.default, torch.ops.aten._adaptive_avg_pool2d.default, torch.ops.aten.mean.dim}
WEIGHTS = torch.ops.quantized_decomposed.dequantize_per_channel.default


def int8_of(
    net: nn.Module,
    flow: FlowName = FlowName.fx,
    qconfig: QConfig | None = None,
    engine: Engine = Engine.qnnpack,
    batch: Tensor | None = None,
) -> QuantizedModel:
    batch = images(16, seed=3) if batch is None else batch
    how = spec(qconfig, engine=engine)
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, how, batch[:2]), how, batch[:2])
    if FLOWS[flow].calibrates:
        quantize.calibrate(prepared, batch.split(8))
    return FLOWS[flow].convert(prepared)


def program_of(int8: QuantizedModel, batch: Tensor) -> fx.GraphModule:
    with quantize.engine(int8.engine):
        return qdq.program(int8.module, batch[:2])


def run(int8: QuantizedModel, batch: Tensor) -> Tensor:
    with quantize.engine(int8.engine), torch.inference_mode():
        return int8.module(batch)


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def check(int8: QuantizedModel, batch: Tensor) -> fx.GraphModule:
    """The program parts from what is executed by less than INT8 parts from FP32: by how values are rounded, not more.

    Both round the same values to the same grids, and part where one lies between two steps. (A program with one scale
    that is 5% off parts by more: see below.)
    """
    made = program_of(int8, batch)
    with torch.inference_mode():
        executed, written, fp32 = run(int8, batch), made(batch), int8.fused(batch)
    assert rms(executed - written) <= rms(executed - fp32)
    return made


def calls(made: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in made.graph.nodes if node.target is target]


# Torch writes circular padding and recurrent layers with functions that work in place, on parts of a tensor. One
# network has a group of channels for each image.
WITHOUT = {"ConditionalConv": "module conv2d", "Paddings": "module pad", "RowMemory": "module gru (GRU)"}
CASES = [
    (name, flow)
    for name, network in networks.NETWORKS.items()
    for flow in (FlowName.fx, FlowName.eager)
    if not network.refused(flow, Engine.qnnpack)
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "flow"), CASES)
def test_networks_as_people_write_them_have_a_program(name: str, flow: FlowName) -> None:
    batch = networks.images(33, seed=5)
    int8 = int8_of(networks.built(name), flow, batch=networks.images(16, seed=1))
    if name in WITHOUT:
        with pytest.raises(qdq.UnsupportedError) as caught:
            program_of(int8, batch)
        assert str(caught.value).startswith(f"{WITHOUT[name]} ")
        assert len(str(caught.value).splitlines()) == 1
        return
    made = check(int8, batch)
    one = made(batch[:1])
    assert one.shape == (1, networks.CLASSES)
    assert float((one - made(batch)[:1]).abs().max()) < 0.05 * float(made(batch).abs().max())


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize(
    "qconfig",
    [
        settings(),
        settings("per_tensor", "asymmetric"),
        settings("per_channel", activation_scheme="symmetric"),
        settings(overflow="activations"),
        settings(range_after_clamp=False),
    ],
    ids=["per_channel", "per_tensor", "symmetric", "reduced", "wide"],
)
def test_it_computes_what_is_executed(flow: FlowName, qconfig: QConfig) -> None:
    check(int8_of(trained(architectures.tiny()), flow, qconfig), images(33, seed=5))
    check(int8_of(trained(Chain(nn.ReLU6)), flow, qconfig), images(33, seed=5))


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_a_wrong_scale_would_show(flow: FlowName) -> None:
    batch = images(33, seed=5)
    int8 = int8_of(trained(architectures.tiny()), flow)
    made = program_of(int8, batch)
    node = calls(made, torch.ops.quantized_decomposed.dequantize_per_tensor.default)[1]
    node.args = (node.args[0], node.args[1] * 1.05, *node.args[2:])  # type: ignore[operator]
    made.recompile()
    with torch.inference_mode():
        assert rms(run(int8, batch) - made(batch)) > rms(run(int8, batch) - int8.fused(batch))


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_scales_are_the_runs_own_and_weights_are_int8(flow: FlowName) -> None:
    int8 = int8_of(trained(architectures.tiny()), flow)
    made = check(int8, images(8))
    grids = {(float(q.scale[0]), int(q.zero_point[0])) for name, q in int8.qparams.items() if q.scale.size == 1}
    for node in calls(made, QUANTIZE):
        assert any(node.args[1] == pytest.approx(scale) and node.args[2] == zero for scale, zero in grids)
    weights = [made.get_buffer(str(node.args[0].target)) for node in calls(made, WEIGHTS)]
    assert [weight.dtype for weight in weights] == [torch.int8] * sum(layer.int8 for layer in int8.layers)
    in_float = sum(one.numel() for one in made.buffers() if one.is_floating_point())
    assert in_float < 0.15 * sum(one.numel() for one in weights)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_a_float_model_has_a_program_without_quantize_operators(flow: FlowName) -> None:
    net, batch = trained(architectures.tiny()), images(33)
    fused = FLOWS[flow].fuse(net, spec(), batch)
    made = qdq.program(fused, batch)
    assert not calls(made, QUANTIZE)
    torch.testing.assert_close(made(batch), fused(batch), rtol=1e-4, atol=1e-4)


def test_exported_for_any_number_of_images() -> None:
    int8 = int8_of(trained(Plain()))
    exported = int8.qdq_program(images(2)).module()
    for count in (1, 33):
        batch = images(count, seed=count)
        torch.testing.assert_close(exported(batch), program_of(int8, batch)(batch))


# ------------------------------------------------------------------------------------------------ what runtimes fuse


def test_a_clamp_is_one_of_codes_where_the_grid_does_not_end_there() -> None:
    clamp = torch.ops.aten.clamp.default
    asymmetric = check(int8_of(trained(Chain())), images(8))
    assert not calls(asymmetric, clamp)  # a ReLU's zero point is 0, and so is the smallest code
    assert not calls(asymmetric, torch.ops.aten.relu.default)
    symmetric = check(int8_of(trained(Chain()), qconfig=settings(activation_scheme="symmetric")), images(8))
    assert [node.args[1:] for node in calls(symmetric, clamp)] == [(128, 255)] * 3
    assert all(node.args[0].target is QUANTIZE for node in calls(symmetric, clamp))


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_are_clamps_of_codes(flow: FlowName, bits: int) -> None:
    int8 = int8_of(trained(Plain()) if flow is FlowName.fx else trained(architectures.tiny()), flow,
                   settings(activation_bits=bits))  # fmt: skip
    made = check(int8, images(33, seed=5))
    clamps = calls(made, torch.ops.aten.clamp.default)
    assert len(clamps) >= 5
    assert all(node.args[2] <= 2**bits - 1 for node in clamps)
    for node in calls(made, QUANTIZE):
        if set(node.users) - set(clamps):  # a tensor that holds codes, or means of codes, of one that is clamped
            assert node.args[0].target in PASSING


class Padded(nn.Module):
    """Convolutions behind paddings: as wide on both sides, and TensorFlow's, wider at the end."""

    def __init__(self, pads: list[int]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
        self.fc, self.pads = nn.Linear(8, 10), pads

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.pad(x, self.pads)))
        return self.fc(self.second(F.pad(x, self.pads)).mean((2, 3)))


@pytest.mark.parametrize("engine", [Engine.qnnpack, Engine.fbgemm])
def test_a_padding_goes_into_the_convolution(engine: Engine) -> None:
    even = check(int8_of(trained(Padded([1, 1, 2, 2])), engine=engine, qconfig=settings(overflow="weights")), images(8))
    convolutions = calls(even, torch.ops.aten.conv2d.default)
    assert [node.args[4] for node in convolutions] == [[2, 1]] * 2
    assert not calls(even, torch.ops.aten.constant_pad_nd.default)
    uneven = check(
        int8_of(trained(Padded([0, 1, 0, 1])), engine=engine, qconfig=settings(overflow="weights")), images(8)
    )
    pads = calls(uneven, torch.ops.aten.constant_pad_nd.default)
    assert [[user.target for user in node.users] for node in pads] == [[torch.ops.aten.conv2d.default]] * 2


def test_a_stride_that_was_taken_before_a_convolution_is_its_own_again() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, stride=2), nn.Flatten(), nn.Linear(8 * 64, 10))
    int8 = int8_of(trained(net), engine=Engine.onednn, qconfig=settings(overflow="weights"))
    assert any(isinstance(module, AfterStride) for module in int8.module.modules())
    made = check(int8, images(8))
    assert [node.args[3] for node in calls(made, torch.ops.aten.conv2d.default)] == [[1, 1], [2, 2]]
    assert not calls(made, torch.ops.aten.slice.Tensor)


def test_a_reshape_computes_the_batch_from_the_other_sizes() -> None:
    for name in ("ShuffleUnits", "SqueezeExciteNet", "TwoScales"):
        made = program_of(int8_of(networks.built(name), batch=networks.images(16)), networks.images(2))
        assert not calls(made, torch.ops.aten.sym_size.int), name


# ------------------------------------------------------------------------------------------------ refusals


def test_what_computes_its_own_ranges_has_no_program() -> None:
    int8 = int8_of(trained(architectures.tiny()), FlowName.dynamic)
    with pytest.raises(qdq.UnsupportedError, match=r"module fc \(Linear\) executes quantized\.linear_dynamic"):
        program_of(int8, images(2))


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) / x.shape[0] ** 0.5


class Unbinding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([one.mean((1, 2)) for one in x.unbind(0)])


@pytest.mark.parametrize(("net", "words"), [(Counting(), "computes"), (Unbinding(), "other operators for 3 images")])
def test_what_depends_on_the_number_of_images_is_refused(net: nn.Module, words: str) -> None:
    with pytest.raises(qdq.UnsupportedError, match=words):
        qdq.program(nn.Sequential(net), images(2))
