"""The networks that come with qexp, each ready for the eager flow.

Ready means: chains of modules that can be traced or a `fuse_model`, no ReLU module used twice, and additions that are
modules. torchvision's quantizable models are all that already; `resnet18` adds a stem for small images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.system.torchvision_import import torchvision


def resnet18(stem: str = "imagenet", num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """torchvision's quantizable ResNet-18, whose state_dict has the names of the plain one. He et al. 2015.

    stem: `imagenet` (7x7 convolution of stride 2, max-pooling) or `cifar` (3x3 of stride 1, no pooling), which keeps
        eight times the resolution and is made for images of about 32x32.
    weights: the name of torchvision's pretrained weights; only with `imagenet` and 1000 classes.
    """
    if stem not in ("imagenet", "cifar"):
        raise ConfigError(f"model.stem={stem}: qexp.models.architectures.resnet18 has the stems imagenet and cifar.")
    net: nn.Module = torchvision.models.quantization.resnet18(weights=weights, num_classes=num_classes, quantize=False)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


class Addition(nn.Module):
    """A sum with a module of its own; flow=eager puts torch.ao's FloatFunctional there, which has the same method."""

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(torch.add(x, y))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a projection where the shape changes (option B of He et al. 2015)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.add_relu = Addition()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.add_relu.add_relu(y, shortcut)


class SmallResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2015, section 4.2: 6n + 2 layers in three stages, the first at full resolution.

    width: channels of the first stage (16 in the paper); blocks: n; stages: of which each doubles the channels.
    """

    def __init__(self, blocks: int, width: int, stages: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        layers, channels = [], width
        for stage in range(stages):
            for block in range(blocks):
                channels_out = width * 2**stage
                layers.append(BasicBlock(channels, channels_out, stride=2 if stage > 0 and block == 0 else 1))
                channels = channels_out
        self.blocks = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, 3, H, W] -> logits float32 [N, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.blocks(x))
        return self.fc(torch.flatten(x, 1))


def resnet20(num_classes: int = 10) -> SmallResNet:
    """ResNet-20 for 32x32 images (He et al. 2015, section 4.2), with projections (option B): 0.27 M parameters.

    The paper's CIFAR nets pad the shortcut with zeros (option A), which the quantized operators can't do.
    """
    return SmallResNet(blocks=3, width=16, stages=3, num_classes=num_classes)


def tiny(num_classes: int = 10, width: int = 8) -> SmallResNet:
    """A residual net of a few thousand parameters, for tests and first tries."""
    return SmallResNet(blocks=1, width=width, stages=2, num_classes=num_classes)
