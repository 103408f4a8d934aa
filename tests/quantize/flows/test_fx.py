"""flow=fx: every BatchNorm after a convolution is folded whatever the module's class, and ranges end at the clamp."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.errors import InputError
from qexp.quantize import FLOWS, Prepared
from qexp.quantize.graph.tracing import trace
from qexp.quantize.inspection import fusion_check
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.system.torchvision_import import torchvision
from tests.helpers.quantizable import Chain, Plain, images, relative_error, settings, spec, trained

TWO = images(2)


class StaticSame(nn.Conv2d):
    """As in EfficientNet-Lite's package: padding by a child, then the functional convolution."""

    def __init__(self, *args: int, pads: tuple[int, int, int, int], **kwargs: int) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.static_padding = nn.ZeroPad2d(pads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DynamicSame(nn.Conv2d):
    """TensorFlow's padding, computed from the input's shape in Python."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.size()[-2:], self.weight.size()[-2:], self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        if sum(pads) > 0:
            x = F.pad(x, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OwnReLU6(nn.ReLU6):
    pass


class FunctionalNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): in evaluation the weight is a constant that is computed."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * 3.0
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def stack(conv: nn.Module, norm: nn.Module | None = None, clamp: nn.Module | None = None) -> nn.Module:
    norm = nn.BatchNorm2d(8) if norm is None else norm
    clamp = nn.ReLU() if clamp is None else clamp
    return nn.Sequential(conv, norm, clamp, nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "padding by a child": lambda: stack(StaticSame(3, 8, 3, pads=(1, 1, 1, 1))),
    "asymmetric padding by a child": lambda: stack(StaticSame(3, 8, 3, stride=2, pads=(0, 1, 0, 1))),
    "padding computed from the shape": lambda: stack(DynamicSame(3, 8, 3, stride=2)),
    "padding named same": lambda: stack(nn.Conv2d(3, 8, 3, padding="same")),
    "padding named same, even kernel": lambda: stack(nn.Conv2d(3, 8, 4, padding="same")),
    "a BatchNorm that calls torch's": lambda: stack(nn.Conv2d(3, 8, 3), OwnBatchNorm(8)),
    "a functional BatchNorm": lambda: stack(nn.Conv2d(3, 8, 3), FunctionalNorm(8)),
    "a BatchNorm without weights": lambda: stack(nn.Conv2d(3, 8, 3), FunctionalNorm(8, affine=False)),
    "a ReLU6 of its own class": lambda: stack(nn.Conv2d(3, 8, 3), None, OwnReLU6()),
    "an identity between": lambda: stack(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.Dropout(0.5))),
    "a transposed convolution": lambda: stack(nn.ConvTranspose2d(3, 8, 3)),
    "weights that are computed": lambda: stack(Standardised(3, 8, 3)),
    "weight norm": lambda: stack(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral norm by a hook": lambda: stack(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))),
}


def through(net: nn.Module, range_after_clamp: bool = True, engine: Engine = Engine.x86) -> tuple[nn.Module, Prepared]:
    fused = FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    qconfig = settings(overflow="activations", range_after_clamp=range_after_clamp)
    prepared = FLOWS[FlowName.fx].prepare(fused, spec(qconfig, engine=engine), TWO)
    quantize.calibrate(prepared, [images(16, seed=3)])
    return fused, prepared


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", list(MODELS))
def test_batchnorm_is_folded_whatever_the_class(name: str) -> None:
    net = trained(MODELS[name]())
    fused, prepared = through(net)
    assert fusion_check.fusion_difference(net, fused, images(8, seed=4)) < 1e-5
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    converted = FLOWS[FlowName.fx].convert(prepared).module
    layers = torch_layers.layers(converted, FLOWS[FlowName.fx], Engine.x86)
    # From 3 to 8 channels torch's kernel is wrong: see quantize/transposed.py.
    first = ("conv_transpose", False) if "transposed" in name else ("conv", True)
    assert [(layer.kind, layer.int8) for layer in layers] == [first, ("pointwise", True), ("linear", True)]
    with quantize.engine(Engine.x86), torch.inference_mode():
        batch = images(5, seed=5)
        assert relative_error(converted(batch), net(batch)) < 0.1


def test_symmetric_padding_moves_inside_the_convolution_and_asymmetric_stays() -> None:
    symmetric = FLOWS[FlowName.fx].fuse(trained(MODELS["padding by a child"]()), spec(), TWO)
    assert not any(node.target is F.pad for node in symmetric.graph.nodes)
    assert symmetric.get_submodule("0")[0].padding == (1, 1)
    asymmetric = FLOWS[FlowName.fx].fuse(trained(MODELS["padding computed from the shape"]()), spec(), TWO)
    assert [node.args[1] for node in asymmetric.graph.nodes if node.target is F.pad] == [[0, 1, 0, 1]]


def test_layers_keep_the_names_that_the_user_gave_them() -> None:
    _, prepared = through(trained(MODELS["padding by a child"]()))
    layers = torch_layers.layers(FLOWS[FlowName.fx].convert(prepared).module, FLOWS[FlowName.fx], Engine.x86)
    assert [layer.name for layer in layers] == ["0", "3", "6"]
    assert layers[0].kernel == "x86 conv"


class Shared(Plain):
    """One convolution and one ReLU, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.again = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.again(x))
        x = self.relu(self.bn3(self.again(x)))
        return self.fc(x.mean((2, 3)))


def test_modules_that_are_called_twice_are_fused_at_each_call() -> None:
    net = trained(Shared())
    fused, prepared = through(net)
    assert fusion_check.fusion_difference(net, fused, images(8, seed=4)) < 1e-5
    layers = torch_layers.layers(FLOWS[FlowName.fx].convert(prepared).module, FLOWS[FlowName.fx], Engine.x86)
    assert [layer.kind for layer in layers].count("conv") == 3
    assert all(layer.int8 and layer.kind != "batchnorm" for layer in layers)


def range_of(prepared: Prepared, name: str) -> tuple[float, float]:
    """The range that was mapped onto a grid of 7 bits."""
    q = torch_layers.read_qparams(prepared.module)[name]
    low, high = (code - int(q.zero_point[0]) for code in (0, 127))
    return low * float(q.scale[0]), high * float(q.scale[0])


def test_a_tensor_before_relu6_takes_its_range_after_it() -> None:
    torch.manual_seed(0)
    net = trained(Chain(nn.ReLU6))
    with torch.no_grad():
        net.features[0].weight.mul_(20)
    _, prepared = through(net)
    assert range_of(prepared, "features.0") == pytest.approx((0, 6), abs=0.05)
    _, prepared = through(net, range_after_clamp=False)
    low, high = range_of(prepared, "features.0")
    assert low < -6
    assert high > 12


@pytest.mark.parametrize(
    "clamp",
    [
        lambda x: F.relu6(x),
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, min=0, max=6.0),
        lambda x: torch.clamp(x, 0.0, 6.0),
    ],
)
def test_functional_clamps_count(clamp: Callable[[Tensor], Tensor]) -> None:
    class Functional(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(clamp(self.bn1(self.conv1(x) * 20)).mean((2, 3)))

    _, prepared = through(trained(Functional()))
    assert range_of(prepared, "bn1") == pytest.approx((0, 6), abs=0.05)


def test_an_observer_that_also_watches_an_unclamped_tensor_is_left_alone() -> None:
    class Joined(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            joined = torch.cat([F.relu6(self.bn1(x) * 10), self.bn2(x) * 10], 1)
            return self.fc(joined[:, 16:].mean((2, 3)))

    net = trained(Joined())
    _, prepared = through(net)
    low, _ = range_of(prepared, "cat")
    assert low < -6


def test_range_after_clamp_changes_nothing_where_conv_and_relu_are_fused() -> None:
    net = trained(Plain())
    answers = []
    for after in (True, False):
        _, prepared = through(net, range_after_clamp=after)
        with quantize.engine(Engine.x86), torch.inference_mode():
            answers.append(FLOWS[FlowName.fx].convert(prepared).module(images(4)))
    assert torch.equal(*answers)


def test_prelu_stays_in_fp32_since_torchs_int8_one_is_wrong() -> None:
    net = trained(stack(nn.Conv2d(3, 8, 3), clamp=nn.PReLU()))
    _, prepared = through(net)
    with quantize.engine(Engine.x86), torch.inference_mode():
        batch = images(8, seed=5)
        converted = FLOWS[FlowName.fx].convert(prepared).module
        assert relative_error(converted(batch), net(batch)) < 0.1
    assert all(layer.int8 for layer in torch_layers.layers(converted, FLOWS[FlowName.fx], Engine.x86))


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return super().forward(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_graph_that_cannot_be_traced_is_refused_with_the_module_and_the_flow_that_works() -> None:
    net = trained(Nested())
    with pytest.raises(InputError, match=r"flow=fx can't trace Nested: its module body \(Branching\) decides by"):
        FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    with pytest.raises(InputError, match=r"works with flow=dynamic\.$") as refusal:
        quantize.dry_run(net, FLOWS[FlowName.fx], spec(), TWO)
    assert "\n" not in str(refusal.value)


def test_batch_size_stays_free_where_a_model_reads_its_shape() -> None:
    class Views(Plain):
        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            x = x.view(n, c, h * w).view(x.size(0), c, h, w)
            x = F.relu(self.bn1(self.conv1(x)))
            return self.fc(F.avg_pool2d(x, x.shape[-1]).view(x.shape[0], -1))

    net = trained(Views())
    graph = trace(net, TWO)
    for count in (1, 7):
        assert torch.equal(graph(images(count)), net(images(count)))


@pytest.mark.parametrize("engine", quantize.supported())
def test_every_engine_takes_the_flow(engine: Engine) -> None:
    net = trained(Plain())
    _, prepared = through(net, engine=engine)
    converted = FLOWS[FlowName.fx].convert(prepared).module
    layers = torch_layers.layers(converted, FLOWS[FlowName.fx], engine)
    assert [layer.kind for layer in layers] == ["conv", "depthwise", "pointwise", "linear"]
    assert all(layer.int8 for layer in layers)
    with quantize.engine(engine), torch.inference_mode():
        assert relative_error(converted(TWO), net(TWO)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 21),
        ("mobilenet_v2", 53),
        ("mobilenet_v3_small", 54),
        ("efficientnet_b0", 82),
        ("shufflenet_v2_x0_5", 57),
        ("regnet_y_400mf", 86),
    ],
)
def test_torchvision_models_unmodified_run_wholly_in_int8(name: str, count: int) -> None:
    net = trained(getattr(torchvision.models, name)(weights=None))
    example = images(2, size=64)
    fused = FLOWS[FlowName.fx].fuse(net, spec(), example)
    assert fusion_check.fusion_difference(net, fused, example) < 1e-4
    prepared = FLOWS[FlowName.fx].prepare(fused, spec(settings(overflow="activations")), example)
    quantize.calibrate(prepared, [example])
    layers = torch_layers.layers(FLOWS[FlowName.fx].convert(prepared).module, FLOWS[FlowName.fx], Engine.x86)
    assert len(layers) == count
    assert all(layer.int8 and layer.kind != "batchnorm" for layer in layers)


class Indices(nn.Module):
    """A pooling that gives indices, by module and by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.unpool = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.MaxPool2d(2, 2, 0, 1, True),
            F.max_unpool2d,
        )
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.conv(x))
        y, more = F.max_pool2d(x, 2, return_indices=True)
        x = self.unpool(self.unpool(y, more, 2), indices, 2)
        return self.fc(x.mean((2, 3)))


class Selected(nn.Module):
    """Indices and masks are reshaped by functions that torch also knows of INT8 tensors; so is a complex number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        mask = (x.mean(1) < 1e9).unsqueeze(1)
        first = torch.gather(x, 2, mask.long().flatten(1).unsqueeze(1).repeat(1, 8, 1))
        spectrum = torch.view_as_real(torch.fft.fft(x).unsqueeze(1)).flatten(1, 2)
        return self.fc((first * mask).mean(2) + spectrum[..., 0, 0])


class Computed(nn.Module):
    """A convolution whose weights the model computes from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weights, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8 * 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        b, c, h, w = x.shape
        x = self.mixed(x.reshape(1, b * c, h, w), self.weights(x.mean((2, 3))).view(b * 8, 8, 1, 1), b)
        return self.fc(x.view(b, 8, h, w).mean((2, 3)))

    def mixed(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return F.conv2d(x, weight, groups=groups)


class Computed1d(Computed):
    def mixed(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return F.conv1d(x.flatten(2), weight.flatten(2), groups=groups)


@pytest.mark.parametrize("kind", [Indices, Selected, Computed, Computed1d])
def test_what_has_no_grid_stays_as_it_is_between_int8_layers(kind: type[nn.Module]) -> None:
    net = trained(kind())
    quantize.dry_run(net, FLOWS[FlowName.fx], spec(settings(overflow="activations")), TWO)
    _, prepared = through(net)
    converted = FLOWS[FlowName.fx].convert(prepared).module
    assert sum(layer.int8 for layer in torch_layers.layers(converted, FLOWS[FlowName.fx], Engine.x86)) >= 2
    with quantize.engine(Engine.x86), torch.inference_mode():
        batch = images(5, seed=5)
        assert relative_error(converted(batch), net(batch)) < 0.1


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_ranges_are_taken_behind_clamps(flow: FlowName) -> None:
    def taken(clamp: type[nn.Module], **how: object) -> dict[str, str]:
        settled, batch = spec(settings(**how)), images(8)  # type: ignore[arg-type]
        prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(trained(Chain(clamp)), settled, batch), settled, batch)
        quantize.calibrate(prepared, [batch])
        found = FLOWS[flow].convert(prepared).ranges_taken
        assert found["fc"] == "output"
        return {name: where for name, where in found.items() if name in ("features.0", "features.3", "features.6")}

    assert set(taken(nn.ReLU6).values()) == {"after clamp to 0…6"}
    assert set(taken(nn.ReLU6, range_after_clamp=False).values()) == {"output"}
    assert set(taken(nn.ReLU).values()) == {"after relu"}
    assert set(taken(nn.GELU if flow is FlowName.fx else nn.LeakyReLU).values()) == {"output"}
