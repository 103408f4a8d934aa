"""Small networks and settings that the tests of quantization share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F

from qexp.config.schema import (
    Activation,
    ActivationObserver,
    Engine,
    FlowName,
    Granularity,
    Observer,
    Overflow,
    QConfig,
    Scheme,
    Weight,
    WeightObserver,
)
from qexp.models import architectures
from qexp.quantize import FLOWS, Prepared, QuantizationSpec, QuantizedModel

BY_TORCH = [flow for flow in FlowName if flow.executed_by_torch]
MINMAX = Observer(ActivationObserver.minmax)
RECORDED = {
    "minmax": MINMAX,
    "moving_average": Observer(ActivationObserver.moving_average, averaging_constant=0.1),
    "percentile": Observer(ActivationObserver.percentile, percentile=99.5),
    "mse": Observer(ActivationObserver.mse),
    "entropy": Observer(ActivationObserver.entropy, bins=1024),
}


def settings(
    granularity: str = "per_channel",
    weight_scheme: str = "symmetric",
    activation_scheme: str = "asymmetric",
    overflow: str = "none",
    weight_bits: int = 8,
    activation_bits: int = 8,
    range_after_clamp: bool = True,
    weight_observer: str = "minmax",
) -> QConfig:
    return QConfig(
        weight=Weight(Granularity(granularity), Scheme(weight_scheme), weight_bits, WeightObserver(weight_observer)),
        activation=Activation(Scheme(activation_scheme), activation_bits),
        overflow=Overflow(overflow),
        range_after_clamp=range_after_clamp,
    )


def spec(
    qconfig: QConfig | None = None, observer: Observer = MINMAX, engine: Engine = Engine.x86, fusion: bool = True
) -> QuantizationSpec:
    return QuantizationSpec(qconfig or settings(), observer, engine, fusion)


def assembled(
    fused: nn.Module, int8: nn.Module, flow: FlowName, engine: Engine = Engine.x86, prepared: nn.Module | None = None
) -> QuantizedModel:
    """A quantized model of these parts; without a prepared one, nothing is known of its tensors' parameters."""
    return QuantizedModel(Prepared(FLOWS[flow], spec(engine=engine), fused, prepared or fused), int8)


def images(count: int = 8, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, with weights and BatchNorm statistics as after training: none of them 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                fan_in = m.weight[0].numel()
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.1)
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.3)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                if m.affine:
                    m.weight.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                    m.bias.copy_(torch.randn(m.num_features, generator=generator) * 0.3)
    return module.eval().requires_grad_(False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of the expected values."""
    return float((actual - expected).norm() / expected.norm())


class StubbedTiny(architectures.SmallResNet):
    """`architectures.tiny` as the tutorial writes it: with stubs of its own, and FloatFunctionals for additions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(blocks=1, width=width, stages=2, num_classes=10)
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        for block in self.blocks:
            block.add_relu = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(super().forward(self.quant(x)))


class Plain(nn.Module):
    """A residual network as people write them: a bare `+`, a functional ReLU, no stubs, no fuse_model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        y = nn.functional.relu(self.bn2(self.depthwise(x)))
        x = nn.functional.relu(x + self.bn3(self.pointwise(y)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Chain(nn.Module):
    """Modules in sequence, each used once, which the eager flow supports without changes."""

    def __init__(self, clamp: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            clamp(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            clamp(),
            nn.Conv2d(16, 16, 1),
            clamp(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


class Upsampling(nn.Module):
    """Has a layer whose 16-bit accumulators can't be emulated: a transposed convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.up(self.conv(x)).mean((2, 3)))
        return logits

    def fuse_model(self, is_qat: bool = False) -> None:
        """There is nothing to fuse."""


class Squeezed(nn.Module):
    """Blocks of the MobileNets: inverted bottlenecks, squeeze and excitation, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.gate = nn.Hardsigmoid()
        self.project = nn.Conv2d(24, 8, 1, stride=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.project(x * gate)
        x = torch.cat([x, self.grouped(x) + x], 1)
        return self.fc(x.mean((2, 3)))


class Twice(nn.Module):
    """A convolution and an addition that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.add.add(x, self.conv(x))
        x = self.add.add(x, self.conv(x))
        return self.fc(x.mean((2, 3)))


class Again(nn.Module):
    """An activation and a name of torch's own for it, both called more than once; and an addition with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.hardswish, self.fc = nn.Hardswish(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hardswish(self.one(x))
        y = self.hardswish(self.two(x) * 8)
        x = F.relu(x + y)
        x = F.relu(x + self.hardswish(y))
        return self.fc(x.mean((2, 3)))
