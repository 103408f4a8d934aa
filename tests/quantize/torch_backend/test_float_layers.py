"""Layers and operations that torch's INT8 kernels compute otherwise: each is brought into a form that is right.

The right value is always the float module's, in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.quantize import FLOWS
from qexp.quantize.inspection import fusion_check
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.quantize.torch_backend.float_layers import norm_is_random
from qexp.quantize.torch_backend.layer_equivalence import check_layers
from tests.helpers.quantizable import assembled, images, relative_error, settings, spec, trained

TWO = images(2)
BOTH = [FlowName.eager, FlowName.fx]


class Around(nn.Module):
    """A layer or function between convolutions."""

    def __init__(self, layer: nn.Module | None, function: Callable[[Tensor], Tensor] | None = None, stride: int = 1):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=stride)
        self.layer = nn.Identity() if layer is None else layer
        self.second, self.relu = nn.LazyConv2d(16, 1), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.first(x))
        if self.function is not None:
            x = self.function(x)
        return self.fc(self.pool(self.relu(self.second(x))).flatten(1))


class Answers(nn.Module):
    """A layer or function that computes the model's output."""

    def __init__(self, layer: nn.Module | None, function: Callable[[Tensor], Tensor] | None = None, classes: int = 10):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, classes)
        self.head, self.function = nn.Identity() if layer is None else layer, function

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.fc(self.pool(self.conv(x)).flatten(1)))
        return x if self.function is None else self.function(x)


def made(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net.eval()(TWO.clone())  # lazy layers learn their shapes
    for part in net.modules():
        if isinstance(part, nn.InstanceNorm2d) and part.track_running_stats:
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
        if isinstance(part, nn.InstanceNorm2d | nn.GroupNorm) and part.affine:
            with torch.no_grad():
                part.weight.copy_(torch.rand(part.weight.shape, generator=generator) + 0.5)
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
    return trained(net, seed)


def through(net: nn.Module, flow: FlowName, engine: Engine = Engine.x86) -> tuple[nn.Module, nn.Module]:
    quantize.dry_run(net, FLOWS[flow], spec(engine=engine), TWO)
    fused = FLOWS[flow].fuse(net, spec(), TWO)
    assert fusion_check.fusion_difference(net, fused, images(8, seed=4)) < 1e-5
    prepared = FLOWS[flow].prepare(fused, spec(settings(overflow="activations"), engine=engine), TWO)
    quantize.calibrate(prepared, [images(16, seed=3)])
    converted = FLOWS[flow].convert(prepared).module
    check_layers(assembled(fused, converted, flow, engine), images(4, seed=6))
    return fused, converted


def error(net: nn.Module, converted: nn.Module) -> float:
    batch = images(32, seed=4)
    with quantize.engine(Engine.x86), torch.inference_mode():
        first = converted(batch)
        assert all(torch.equal(converted(batch), first) for _ in range(3))
        return relative_error(first, net(batch))


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_with_running_statistics_is_a_batchnorm(flow: FlowName, affine: bool) -> None:
    net = made(Around(nn.InstanceNorm2d(8, affine=affine, track_running_stats=True)))
    fused, converted = through(net, flow)
    assert not any("Norm" in type(part).__name__ for part in fused.modules())
    assert [layer.kind for layer in torch_layers.layers(converted, FLOWS[flow], Engine.x86)] == [
        "conv",
        "pointwise",
        "linear",
    ]
    assert error(net, converted) < 0.1
    counterpart = made(Around(nn.BatchNorm2d(8, affine=affine)))
    counterpart.load_state_dict(net.state_dict(), strict=False)  # a BatchNorm counts batches besides
    assert torch.allclose(counterpart(TWO), fused(TWO), atol=1e-5)


def test_a_functional_instance_norm_with_running_statistics_is_folded_too() -> None:
    mean, variance = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    net = made(Around(None, lambda x: F.instance_norm(x, mean, variance, use_input_stats=False)))
    fused, converted = through(net, FlowName.fx)
    assert not any("Norm" in type(part).__name__ for part in fused.modules())
    assert error(net, converted) < 0.1


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("stride", [8, 4, 2])  # maps of 2x2, 4x4, 8x8
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8), nn.GroupNorm(8, 8), nn.GroupNorm(4, 8), nn.GroupNorm(1, 8)])
def test_norms_of_small_maps_answer_as_in_fp32(norm: nn.Module, stride: int, flow: FlowName) -> None:
    net = made(Around(norm, stride=stride))
    _, converted = through(net, flow)
    assert error(net, converted) < 0.35  # a norm of few values makes much of rounding; at random it is above 2


def test_a_functional_instance_norm_of_small_maps_answers_as_in_fp32() -> None:
    net = made(Around(None, lambda x: F.instance_norm(x, weight=torch.ones(8), bias=torch.zeros(8)), stride=8))
    _, converted = through(net, FlowName.fx)
    assert error(net, converted) < 0.35


@pytest.mark.parametrize("values", [64, 66, 72, 100])
def test_torchs_int8_norms_are_right_from_the_boundary_on(values: int) -> None:
    assert not norm_is_random(values)
    assert norm_is_random(63)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(64, 16, values, 1, generator=generator).contiguous(memory_format=torch.channels_last)
    with quantize.engine(Engine.x86):
        quantized = torch.quantize_per_tensor(image, 0.05, 128, torch.quint8)
        answer = torch.ops.quantized.instance_norm(quantized, None, None, 1e-5, 0.06, 128)
    expected = F.instance_norm(quantized.dequantize()).clamp(-128 * 0.06, 127 * 0.06)
    assert float((answer.dequantize() - expected).abs().max()) <= 0.06


HEADS: list[tuple[nn.Module | None, Callable[[Tensor], Tensor] | None]] = [
    (nn.Softmax(1), None),
    (nn.LogSoftmax(1), None),
    (nn.Sigmoid(), None),
    (None, lambda x: F.softmax(x, 1)),
    (None, lambda x: F.softmax(x, dim=-1).squeeze()),
    (None, lambda x: x.softmax(1)),
    (None, lambda x: torch.softmax(x, 1)),
    (None, lambda x: F.log_softmax(x, 1)),
    (None, torch.sigmoid),
    (None, lambda x: x.sigmoid()),
]


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("head", range(len(HEADS)))
def test_a_final_softmax_or_sigmoid_stays_in_fp32(head: int, flow: FlowName) -> None:
    net = made(Answers(*HEADS[head], classes=100))
    with torch.no_grad():
        net.fc.weight.mul_(0.05)  # flat probabilities
        net.fc.bias.zero_()
    _, converted = through(net, flow)
    with quantize.engine(Engine.x86), torch.inference_mode():
        batch = images(16, seed=4)
        answer = converted(batch)
        assert not answer.is_quantized
        # On a grid of 1/256 they would be two or three values, five for a sigmoid.
        assert len(answer.unique()) > 8
        assert float((answer - net(batch)).abs().max()) < 0.02 * float(net(batch).abs().max())


def test_a_softmax_that_an_author_dequantizes_for_is_left_alone() -> None:
    class Author(Answers):
        def __init__(self) -> None:
            super().__init__(nn.Softmax(1))
            self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.dequant(self.fc(self.pool(self.conv(self.quant(x))).flatten(1))))

    net = made(Author())
    _, converted = through(net, FlowName.eager)
    assert error(net, converted) < 0.1


LAYERS: list[Callable[[], nn.Module]] = [
    nn.PReLU, nn.SiLU, nn.CELU, nn.Mish, lambda: nn.GLU(1), lambda: nn.Softmax(1), lambda: nn.LPPool2d(2, 2),
    lambda: nn.AdaptiveMaxPool2d(3), lambda: nn.LocalResponseNorm(3), lambda: nn.ReplicationPad2d(1),
    lambda: nn.AvgPool2d(3, divisor_override=2), lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
]  # fmt: skip


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("make", LAYERS)
def test_layers_that_int8_lacks_stay_in_fp32_between_int8_layers(make: Callable[[], nn.Module], flow: FlowName) -> None:
    net = made(Around(make()))
    _, converted = through(net, flow)
    assert all(layer.int8 for layer in torch_layers.layers(converted, FLOWS[flow], Engine.x86))
    assert error(net, converted) < 0.15


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "times 100": lambda x: x * 100.0,
    "100 times": lambda x: 100.0 * x,
    "times 100, clamped": lambda x: F.relu(x * 100.0),
    "times 100, then pooled": lambda x: F.max_pool2d(x * 100.0, 2),
    "plus 50": lambda x: x + 50.0,
    "add with alpha": lambda x: torch.add(x, x.flip(1), alpha=3.0),
    "method add with alpha": lambda x: x.add(x.flip(1), alpha=3),
    "sub with alpha": lambda x: torch.sub(x, x.flip(1), alpha=3.0),
    "parts of a tuple": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "a tuple": lambda x: torch.cat(x.split(4, 1), 1),
    "positions": lambda x: x + torch.arange(x.shape[-1]),
    "a mask": lambda x: x * (torch.arange(x.shape[-1]) % 2 == 0),
    "a view": lambda x: x.view(x.shape[0], 8, -1, 4),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "a transposed convolution": lambda x: F.conv_transpose2d(x, torch.eye(8).reshape(8, 8, 1, 1), stride=2),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_in_fx_are_right(name: str) -> None:
    net = made(Around(None, FUNCTIONS[name]))
    _, converted = through(net, FlowName.fx)
    assert error(net, converted) < 0.25


@pytest.mark.parametrize("mode", ["circular", "replicate", "reflect"])
def test_paddings_that_repeat_the_image_are_taken_by_fx_at_each_call(mode: str) -> None:
    class Twice(Around):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.layer(F.relu(self.layer(self.first(x)))))
            return self.fc(self.pool(F.relu(self.second(x))).flatten(1))

    net = made(Twice())
    _, converted = through(net, FlowName.fx)
    assert error(net, converted) < 0.15


@pytest.mark.parametrize("flow", BOTH)
def test_a_mean_of_maps_of_one_pixel_is_taken(flow: FlowName) -> None:
    class Shrinks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 16), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean([2, 3]))

    net = made(Shrinks())
    for engine in quantize.supported():
        _, converted = through(net, flow, engine)
        with quantize.engine(engine), torch.inference_mode():
            assert relative_error(converted(images(8, seed=4)), net(images(8, seed=4))) < 0.1


@pytest.mark.parametrize("spelling", ["reshape", "view", "flatten"])
def test_a_layer_after_an_early_reshape_is_in_int8_and_can_be_traced(spelling: str) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(768, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            arguments: Any = (1,) if spelling == "flatten" else (-1, 768)
            return self.b(F.relu(self.a(getattr(x, spelling)(*arguments))))

    net = made(Early()).requires_grad_(True)
    fused, converted = through(net, FlowName.fx)
    assert [layer.int8 for layer in torch_layers.layers(converted, FLOWS[FlowName.fx], Engine.x86)] == [True, True]
    for one in (fused, converted):
        assert not any(parameter.requires_grad for parameter in one.parameters())
        with quantize.engine(Engine.x86):
            torch.jit.trace(one, TWO, check_trace=False)
