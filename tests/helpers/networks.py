"""Networks of many kinds, as people write them; the docstring of each names its special part.

All take float32 [n, 3, 16, 16] and give [n, 10]. `NETWORKS` has them by name; `built` gives one with random weights.
Beside each network stands which flow refuses it, with words of the sentence: of eager mode it takes but what has INT8
modules, or is written with FloatFunctional.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from qexp.config.schema import Engine, FlowName
from qexp.system.torchvision_import import torchvision

SIZE = 16
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A class, and words of the error with which a flow refuses it: fx, fx with engine=qnnpack alone, or eager."""

    build: Callable[[], nn.Module]
    fx: tuple[str, ...]
    qnnpack: tuple[str, ...]
    eager: tuple[str, ...]

    def refused(self, flow: FlowName, engine: Engine) -> tuple[str, ...]:
        """The words of the error; none where the flow quantizes it."""
        if flow is FlowName.eager:
            return self.eager
        return self.fx or (self.qnnpack if engine is Engine.qnnpack else ())


NETWORKS: dict[str, Network] = {}
Words = str | tuple[str, ...]


def network(fx: Words = (), qnnpack: Words = (), eager: Words = ()) -> Callable[[type], type]:
    """A decorator that adds a class to the table."""

    def enter(cls: type) -> type:
        words = [(part,) if isinstance(part, str) else part for part in (fx, qnnpack, eager)]
        NETWORKS[cls.__name__] = Network(cls, *words)
        return cls

    return enter


def images(count: int, seed: int = 0) -> Tensor:
    """Blurred noise of many contrasts: networks distinguish it, where white noise would be averaged away."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), size=SIZE, mode="bilinear")
    contrast = torch.rand(count, 1, 1, 1, generator=generator) + 0.5
    return coarse * contrast + 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)


def built(name: str) -> nn.Module:
    """The network in evaluation mode, with weights and statistics as after training: none of them 0 or 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = NETWORKS[name].build()
    with torch.no_grad():
        weights = set()
        for part in module.modules():
            if isinstance(part, _ConvNd | nn.Linear):
                fan_in = part.weight[0].numel()
                part.weight.copy_(normal(part.weight) * (2 / fan_in) ** 0.5)
                weights.add(part.weight)
            if isinstance(part, _NormBase) and part.running_mean is not None:
                part.running_mean.copy_(0.3 * normal(part.running_mean))
                part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
        for parameter in module.parameters():
            if parameter not in weights:
                parameter.add_(0.2 * normal(parameter))
    return module.eval().requires_grad_(False)


def conv_bn_relu(channels_in: int, channels_out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


# ------------------------------------------------------------------------------------------------ attention


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        scale = self.expand(F.relu(self.reduce(scale)))
        return x * scale.sigmoid()


@network(eager=("module block.5 (SqueezeExcite)", "mul"))
class SqueezeExciteNet(nn.Module):
    """Squeeze and excite in an inverted residual with Hardswish, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.Hardswish(),
            nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False),
            nn.BatchNorm2d(32),
            SqueezeExcite(32),
            nn.Hardswish(),
            nn.Conv2d(32, 16, 1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.block(x))


@network(eager=("own forward (CBAM)", "adaptive_max_pool2d"))
class CBAM(nn.Module):
    """Attention over channels (one MLP for the mean and the maximum) and over pixels (mean and maximum of channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        channel = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(channel).unsqueeze(2).unsqueeze(3)
        pixels = torch.cat([x.mean(dim=1, keepdim=True), x.max(dim=1, keepdim=True)[0]], dim=1)
        x = x * torch.sigmoid(self.spatial(pixels))
        return self.fc(x.mean(dim=(2, 3)))


@network(eager=("own forward (PixelAttention)", "bmm"))
class PixelAttention(nn.Module):
    """Self-attention over pixels by bmm, with a residual that is scaled by a parameter, as in SAGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.query = nn.Conv2d(16, 4, 1)
        self.key = nn.Conv2d(16, 4, 1)
        self.value = nn.Conv2d(16, 16, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.size()
        query = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        key = self.key(x).view(b, -1, h * w)
        attention = F.softmax(torch.bmm(query, key), dim=-1)
        value = self.value(x).view(b, -1, h * w)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(b, c, h, w)
        x = self.gamma * out + x
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 2):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@network(eager=("own forward (VisionTransformer)", "cat"))
class VisionTransformer(nn.Module):
    """Patches by a convolution, an expanded class token, position embeddings, and one block as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 24))
        self.blocks = nn.Sequential(TransformerBlock(24))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@network(eager="module attention (MultiheadAttention)")
class HybridAttention(nn.Module):
    """nn.MultiheadAttention over the pixels of a convolutional stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16, stride=2))
        self.attention = nn.MultiheadAttention(16, num_heads=2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).permute(0, 2, 1)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.norm(tokens + attended)
        return self.fc(tokens.mean(dim=1))


@network(eager=("own forward (EfficientChannelAttention)", "mul"))
class EfficientChannelAttention(nn.Module):
    """A Conv1d over channels, between squeeze, transpose and expand_as (ECA-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.sigmoid = nn.Sigmoid()
        self.last = conv_bn_relu(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        x = self.last(x * self.sigmoid(y).expand_as(x))
        return self.fc(self.avg_pool(x).flatten(start_dim=1))


@network(eager=("own forward (WindowAttention)", "roll"))
class WindowAttention(nn.Module):
    """Shifted windows by roll, view and permute, a bias that is looked up by an index buffer, and torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, 2)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.proj = nn.Linear(16, 16)
        self.bias_table = nn.Parameter(torch.zeros(49, 2))
        rows = torch.arange(16) // 4
        columns = torch.arange(16) % 4
        index = (rows[:, None] - rows[None] + 3) * 7 + columns[:, None] - columns[None] + 3
        self.register_buffer("index", index.flatten())
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        shifted = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        windows = shifted.view(B, H // 4, 4, W // 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, C)
        qkv = self.qkv(windows).reshape(-1, 16, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        bias = self.bias_table[self.index].view(16, 16, 2).permute(2, 0, 1).unsqueeze(0)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        out = self.proj(out.transpose(1, 2).reshape(-1, 16, C))
        out = out.view(B, H // 4, W // 4, 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        x = x + torch.roll(out, shifts=(2, 2), dims=(1, 2))
        return self.fc(x.mean((1, 2)))


@network(eager=("own forward (NonLocal)", "bmm"))
class NonLocal(nn.Module):
    """Attention by einsum, and logits by einsum (bilinear pooling) with a signed square root and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 12, stride=2)
        self.theta, self.phi = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = torch.einsum("bchw,bcyx->bhwyx", self.theta(x), self.phi(x)) / 64
        x = x + torch.einsum("bhwyx,bcyx->bchw", weights, x)
        pairs = torch.einsum("bchw,bdhw->bcd", x, x).flatten(1) / 64
        return self.fc(F.normalize(torch.sign(pairs) * torch.sqrt(pairs.abs() + 1e-6)))


# ------------------------------------------------------------------------------------------------ branches


@network(eager=("own forward (Inception)", "cat"))
class Inception(nn.Module):
    """Four branches, one of them behind an overlapping pooling, joined by cat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.branch1 = conv_bn_relu(16, 8, 1)
        self.branch3 = nn.Sequential(conv_bn_relu(16, 8, 1), conv_bn_relu(8, 12))
        self.branch5 = nn.Sequential(
            conv_bn_relu(16, 4, 1),
            nn.Conv2d(4, 8, (1, 5), padding=(0, 2)),
            nn.Conv2d(8, 8, (5, 1), padding=(2, 0)),
            nn.ReLU(),
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn_relu(16, 4, 1))
        self.dropout = nn.Dropout2d(0.2)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        outputs = [self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)]
        x = torch.cat(outputs, 1)
        x = F.avg_pool2d(x, x.size(-1))
        return self.fc(self.dropout(x).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.conv(F.relu(self.norm(torch.cat(inputs, dim=1)), inplace=True))


@network(eager=("module layers.1 (DenseLayer)", "cat"))
class DenseNet(nn.Module):
    """Each layer takes the list of all before it; every BatchNorm stands before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList([DenseLayer(8 + 4 * i, 4) for i in range(3)])
        self.norm = nn.BatchNorm2d(20)
        self.transition = nn.Conv2d(20, 12, 1)
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = self.pool(self.transition(F.relu(self.norm(torch.cat(features, 1)))))
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))


@network(eager=("own forward (Res2Net)", "add"))
class Res2Net(nn.Module):
    """Channels are split; each part is added to the answer of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])
        self.relu = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        spx = torch.split(x, 4, 1)
        for i in range(3):
            sp = spx[i] if i == 0 else sp + spx[i]  # noqa: F821
            sp = self.relu(self.bns[i](self.convs[i](sp)))
            out = sp if i == 0 else torch.cat((out, sp), 1)  # noqa: F821
        out = torch.cat((out, spx[3]), 1)
        out = self.relu(self.conv3(out) + x)
        return self.fc(out.mean([2, 3]))


@network(eager=("own forward (ShuffleUnits)", "cat"))
class ShuffleUnits(nn.Module):
    """Half of the channels goes by; the rest is mixed in by a channel shuffle of view and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.branch = nn.Sequential(
            conv_bn_relu(8, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            conv_bn_relu(8, 8, 1),
        )
        self.last = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    @staticmethod
    def shuffle(x: Tensor, groups: int) -> Tensor:
        batch, channels, height, width = x.size()
        x = x.view(batch, groups, channels // groups, height, width)
        return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.stem(x).chunk(2, dim=1)
        x = self.shuffle(torch.cat((x1, self.branch(x2)), dim=1), 2)
        return self.fc(F.relu(self.last(x)).mean(-1).mean(-1))


@network(eager=("own forward (SelectiveKernel)", "stack"))
class SelectiveKernel(nn.Module):
    """Branches are stacked and summed with weights from a softmax over the branches (SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.paths = nn.ModuleList([conv_bn_relu(16, 16), nn.Conv2d(16, 16, 3, padding=2, dilation=2)])
        self.reduce = nn.Conv2d(16, 8, 1)
        self.select = nn.Conv2d(8, 32, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.stack([path(x) for path in self.paths], dim=1)
        attention = x.sum(1).mean((2, 3), keepdim=True)
        attention = self.select(F.relu(self.reduce(attention)))
        attention = torch.softmax(attention.view(attention.size(0), 2, 16, 1, 1), dim=1)
        return self.fc(torch.sum(x * attention, dim=1).mean((2, 3)))


@network(eager=("own forward (HighResolution)", "add"))
class HighResolution(nn.Module):
    """Two resolutions exchange maps by strided convolutions and nearest upsampling; ModuleLists in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.down = conv_bn_relu(8, 16, stride=2)
        up = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Upsample(scale_factor=2))
        down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.exchange = nn.ModuleList([nn.ModuleList([nn.Identity(), up]), nn.ModuleList([down, nn.Identity()])])
        self.classifier = nn.Conv2d(24, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        maps = [high, self.down(high)]
        mixed = [F.relu(row[0](maps[0]) + row[1](maps[1])) for row in self.exchange]
        low = F.interpolate(mixed[1], size=mixed[0].shape[2:], mode="nearest")
        return self.classifier(torch.cat([mixed[0], low], 1)).mean((-2, -1))


@network(eager=("own forward (MixedKernels)", "cat"))
class MixedKernels(nn.Module):
    """Depthwise kernels of three sizes over uneven splits of the channels, then grouped convolutions (MixConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [8, 4, 4]
        self.stem = conv_bn_relu(3, 16)
        self.mixed = nn.ModuleDict(
            {str(k): nn.Conv2d(c, c, k, padding=k // 2, groups=c) for k, c in zip((3, 5, 7), self.splits, strict=True)}
        )
        self.norm = nn.BatchNorm2d(16)
        self.grouped = conv_bn_relu(16, 32, groups=4, stride=2)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.stem(x).split(self.splits, dim=1)
        x = torch.cat([conv(part) for conv, part in zip(self.mixed.values(), parts, strict=True)], dim=1)
        x = self.grouped(F.silu(self.norm(x)))
        return self.fc(x.mean((2, 3)))


@network(eager=("own forward (GhostModule)", "cat"))
class GhostModule(nn.Module):
    """Cheap maps by depthwise convolutions, of which some are cut off by slicing."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = conv_bn_relu(3, 12)
        self.cheap = conv_bn_relu(12, 12, groups=12)
        self.second = conv_bn_relu(20, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        x = torch.cat([x1, self.cheap(x1)], dim=1)[:, :20, :, :]
        return self.fc(self.second(x)[:, :, ::2, 1:].amax(dim=(2, 3)))


@network(eager=("own forward (ReparametrisedBlock)", "add"))
class ReparametrisedBlock(nn.Module):
    """Three branches, one of them a bare BatchNorm, summed in one expression before a ReLU (RepVGG)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.dense = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.one = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.identity = nn.BatchNorm2d(16)
        self.nonlinearity = nn.ReLU()
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.stem(inputs)
        out = self.nonlinearity(self.dense(x) + self.one(x) + self.identity(x))
        return self.linear(out.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ shared weights


@network()
class TwoScales(nn.Module):
    """One stem sees the image at two scales, bilinearly made smaller in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16, stride=2))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        pooled = [F.adaptive_avg_pool2d(self.features(scale), 1).flatten(1) for scale in (x, half)]
        return self.fc(torch.cat(pooled, dim=-1))


@network(eager=("own forward (TiedHeads)", "mul"))
class TiedHeads(nn.Module):
    """One linear head reads two depths; two layers share one weight parameter; an image and its mirror are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.conv3.weight = self.conv2.weight
        self.head = nn.Linear(16, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        early = F.max_pool2d(F.relu(self.conv1(x)), 2)
        late = F.relu(self.conv3(F.relu(self.conv2(early))))
        return self.head(early.mean((2, 3))) + 0.5 * self.head(late.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.features(x) + self.features(x.flip(-1))) / 2


@network(eager="BatchNorm norms.0")
class Recurrent(nn.Module):
    """One convolution applied three times, each time with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16) for _ in range(3)])
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))


@network(qnnpack=("own forward (GraphModule)", "add"), eager=("own forward (GatedRecurrence)", "zeros_like"))
class GatedRecurrence(nn.Module):
    """A convolutional GRU that is fed the same maps twice: sigmoid, tanh, 1 - z, a state of zeros_like."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8, stride=2)
        self.gates = nn.Conv2d(16, 16, 3, padding=1)
        self.candidate = nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = torch.zeros_like(x)
        for _ in range(2):
            z, r = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, 1)
            candidate = torch.tanh(self.candidate(torch.cat([x, r * h], dim=1)))
            h = (1 - z) * h + z * candidate
        return self.fc(h.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ poolings


@network(qnnpack=("module pool2 (AvgPool2d)", "avg_pool2d"), eager=("module pool2 (AvgPool2d)", "avg_pool2d"))
class OddPoolings(nn.Module):
    """LPPool, a ceil_mode maximum, an average without its padding, adaptive maxima of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn_relu(3, 8), conv_bn_relu(8, 16), nn.Conv2d(16, 16, 1)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.pool2 = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        self.lp = nn.LPPool2d(2, 2)
        self.max = nn.AdaptiveMaxPool2d((1, 3))
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = F.leaky_relu(self.conv3(x), 0.1)
        return self.fc(self.max(self.lp(x)).flatten(1))


@network(eager=("own forward (MaximumAndMean)", "logsumexp"))
class MaximumAndMean(nn.Module):
    """Global maximum and mean side by side, and between them log-sum-exp."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 16), nn.MaxPool2d(2), conv_bn_relu(16, 16))
        self.fc = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        smooth = torch.logsumexp(x.flatten(2), dim=2) - math.log(64)
        return self.fc(torch.cat([x.amax((2, 3)), smooth, x.mean((2, 3))], 1))


@network()
class SpatialPyramid(nn.Module):
    """Adaptive poolings of 1, 2 and 3 by 3, flattened and joined; one size is computed from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 8, stride=2), conv_bn_relu(8, 8))
        self.fc = nn.Linear(8 * 14 + 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        levels = [F.adaptive_avg_pool2d(x, size).reshape(x.shape[0], -1) for size in (1, 2, 3)]
        kernel = (x.shape[2], math.ceil(x.shape[3] / 1))
        levels.append(F.max_pool2d(x, kernel_size=kernel).view(x.size(0), -1))
        return self.fc(torch.cat(levels, dim=1))


@network(eager=("own forward (GeneralisedMean)", "clamp"))
class GeneralisedMean(nn.Module):
    """GeM: pooling by a power that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16))
        self.p = nn.Parameter(torch.ones(1) * 3)
        self.eps = 1e-6
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.avg_pool2d(x.clamp(min=self.eps).pow(self.p), (x.size(-2), x.size(-1))).pow(1.0 / self.p)
        return self.fc(x.flatten(1))


@network(eager=("own forward (BlurPool)", "convolution"))
class BlurPool(nn.Module):
    """Reflection padding and a depthwise convolution with a buffer as weight, before each subsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_relu(3, 12), conv_bn_relu(12, 12)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = kernel[:, None] * kernel[None, :] / 16
        self.register_buffer("kernel", kernel[None, None].repeat(12, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.pad(self.conv1(x)), self.kernel, stride=2, groups=12)
        x = F.conv2d(F.pad(self.conv2(x), (1, 1, 1, 1), mode="reflect"), self.kernel, stride=2, groups=x.shape[1])
        return self.fc(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])


@network(eager=("module pool (MaxPool2d)", "max_pool2d_with_indices"))
class PoolIndices(nn.Module):
    """A maximum that hands its indices to the unpooling, as in SegNet."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = conv_bn_relu(3, 16)
        self.pool = nn.MaxPool2d(2, stride=2, return_indices=True)
        self.middle = conv_bn_relu(16, 16)
        self.unpool = nn.MaxUnpool2d(2, stride=2)
        self.decode = conv_bn_relu(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.encode(x))
        x = self.decode(self.unpool(self.middle(x), indices))
        return self.fc(x.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ early reshapes


@network()
class Focus(nn.Module):
    """Space to depth by slices with steps, before the first convolution (YOLOv5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.act = nn.SiLU(inplace=True)
        self.down = nn.Conv2d(16, 24, 3, 2, 1)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = self.act(self.bn(self.conv(x)))
        return self.fc(F.relu(self.down(x)).mean([-1, -2]))


@network()
class SpaceToDepth(nn.Module):
    """Space to depth by view and permute at the start, PixelShuffle and PixelUnshuffle further on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(48, 16, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv2 = conv_bn_relu(4, 8)
        self.unshuffle = nn.PixelUnshuffle(2)
        self.conv3 = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        N, C, H, W = x.size()
        x = x.view(N, C, H // 4, 4, W // 4, 4).permute(0, 3, 5, 1, 2, 4).contiguous()
        x = self.conv1(x.view(N, C * 16, H // 4, W // 4))
        x = self.unshuffle(self.conv2(self.shuffle(x)))
        return self.fc(torch.tanh(self.conv3(x)).mean((2, 3)))


@network(eager=("module unfold (Unfold)", "im2col"))
class UnfoldedPatches(nn.Module):
    """Patches by unfold, a linear layer for each, folded back into maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.unfold = nn.Unfold(kernel_size=4, stride=4)
        self.conv = conv_bn_relu(16, 16)
        self.fc = nn.Linear(16 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.unfold(x).transpose(1, 2)
        tokens = F.gelu(self.embed(patches))
        x = tokens.transpose(1, 2).reshape(-1, 16, 4, 4)
        return self.fc(self.conv(x).reshape(x.shape[0], -1))


@network(eager=("own forward (Mixer)", "add"))
class Mixer(nn.Module):
    """Linear layers over tokens and over channels in turn (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, kernel_size=4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(approximate="tanh"), nn.Linear(48, 24))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


@network()
class FlattenAndBack(nn.Module):
    """A linear layer over all pixels of the image, whose answer is viewed as maps again."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(3 * SIZE * SIZE, 8 * 4 * 4)
        self.unflatten = nn.Unflatten(1, (8, 4, 4))
        self.conv = conv_bn_relu(8, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unflatten(F.relu(self.linear(self.flatten(x))))
        x = self.conv(x).permute(0, 2, 3, 1).reshape(len(x), -1, 16)
        return self.fc(x).mean(dim=1)


# ------------------------------------------------------------------------------------------------ norms


class ChannelsFirstNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = nn.GELU()
        self.gamma = nn.Parameter(1e-2 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return shortcut + x.permute(0, 3, 1, 2)


@network(eager=("module stem.1 (ChannelsFirstNorm)", "sub"))
class ConvNeXt(nn.Module):
    """LayerNorm over channels, once in channels-last and once written by hand; LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelsFirstNorm(16))
        self.stage = nn.Sequential(ConvNeXtBlock(16), ConvNeXtBlock(16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stage(self.stem(x)).mean([-2, -1])))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        w = (self.weight - m) / torch.sqrt(v + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@network(eager="module conv1 (StandardisedConv)")
class GroupNormNet(nn.Module):
    """GroupNorm after convolutions whose weights are standardised in the forward (BiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = StandardisedConv(3, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = StandardisedConv(16, 16, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(1, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@network()
class InstanceNormNet(nn.Module):
    """InstanceNorm with and without weights, and with the statistics of training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.norm1 = nn.InstanceNorm2d(16, affine=True)
        self.norm2 = nn.InstanceNorm2d(16)
        self.norm3 = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        return self.fc(F.max_pool2d(x, 4).flatten(2).mean(2))


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


@network(eager=("module norm1 (RMSNorm)", "pow"))
class GatedTokens(nn.Module):
    """A root-mean-square norm written by hand, torch's own, and a gated MLP (SwiGLU) by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.norm1, self.norm2 = RMSNorm(24), nn.RMSNorm(24)
        self.w12, self.w3 = nn.Linear(24, 64), nn.Linear(32, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        gate, value = self.w12(self.norm1(x)).chunk(2, dim=-1)
        x = x + self.w3(F.silu(gate) * value)
        return self.head(self.norm2(x).mean(-2))


@network()
class LocalResponse(nn.Module):
    """LocalResponseNorm and overlapping poolings, as in AlexNet."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=1.0),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 16, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(144, 32), nn.ReLU(inplace=True), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class PreActivation(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out, affine=False)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += shortcut
        return out


@network(eager=("module blocks.0 (PreActivation)", "add_"))
class PreActivationResNet(nn.Module):
    """BatchNorm and ReLU before each convolution, one BatchNorm without weights, `+=` and hasattr in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(PreActivation(16, 16, 1), PreActivation(16, 24, 2))
        self.linear = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.conv(x))
        out = F.avg_pool2d(out, 8)
        return self.linear(out.view(out.size(0), -1))


class FrozenBatchNorm(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, value in (
            ("weight", torch.rand(n, generator=generator) + 0.5),
            ("bias", torch.randn(n, generator=generator) * 0.3),
            ("running_mean", torch.randn(n, generator=generator) * 0.3),
            ("running_var", torch.rand(n, generator=generator) + 0.5),
        ):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = w * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (b - self.running_mean.reshape(1, -1, 1, 1) * scale)


@network(eager=("module bn1 (FrozenBatchNorm)", "mul"))
class FrozenNorms(nn.Module):
    """A BatchNorm that is arithmetic with buffers, as detection backbones have it; torchvision's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), FrozenBatchNorm(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 2, 1, bias=False)
        self.bn2 = torchvision.ops.FrozenBatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@network(eager=("own forward (ResponseNorm)", "linalg_vector_norm"))
class ResponseNorm(nn.Module):
    """Global response normalisation by torch.norm over pixels in channels-last (ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.BatchNorm2d(16))
        self.expand, self.reduce = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, 32)) for _ in range(2))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = F.gelu(self.expand(x))
        gx = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        x = x + self.reduce(self.gamma * (y * nx) + self.beta + y)
        return self.fc(x.mean((1, 2)))


# ------------------------------------------------------------------------------------------------ functions, in place


@network(eager="BatchNorm batch_norm")
class Functional(nn.Module):
    """No layer is a module: weights in a ParameterDict, statistics in buffers, everything from torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5)

        self.p = nn.ParameterDict(
            {
                "conv1": weight(16, 3, 3, 3),
                "gain": torch.ones(16),
                "shift": torch.zeros(16),
                "conv2": weight(16, 1, 3, 3),
                "conv3": weight(16, 16, 1, 1),
                "fc": weight(CLASSES, 16),
                "bias": torch.zeros(CLASSES),
            }
        )
        self.register_buffer("mean", torch.randn(16, generator=generator) * 0.3)
        self.register_buffer("var", torch.rand(16, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        p = self.p
        x = F.conv2d(x, p["conv1"], padding=1)
        x = F.relu6(F.batch_norm(x, self.mean, self.var, p["gain"], p["shift"], training=self.training))
        y = F.conv2d(input=x, weight=p["conv2"], stride=1, padding=1, groups=16).clamp(0, 6)
        y = torch.conv2d(y, p["conv3"])
        x = torch.relu(x + y)
        x = F.dropout(F.max_pool2d(x, 2), 0.2, self.training)
        return F.linear(torch.mean(x, (2, 3)), p["fc"], p["bias"])


@network(eager=("own forward (InPlace)", "mul_"))
class InPlace(nn.Module):
    """Every activation and every sum in place, and results that nobody assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.leaky, self.elu = nn.LeakyReLU(0.1, inplace=True), nn.ELU(inplace=True)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        F.relu(x, inplace=True)
        y = self.conv2(x)
        self.leaky(y)
        y.mul_(self.scale)
        x = x + y
        x.clamp_(max=4.0)
        y = self.conv3(x)
        y += x
        torch.relu_(y)
        z = F.max_pool2d(y, 2)
        z = self.elu(self.conv4(z))
        z.add_(0.5).mul_(2).sub_(1)
        return self.fc(z.mean((2, 3)))


@network(fx="own forward (InPlaceViews)", eager="own forward (InPlaceViews)")
class InPlaceViews(nn.Module):
    """Writes into slices of a tensor: half of the channels gets a ReLU, a border is set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_relu(3, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x[:, :8] = F.relu(x[:, :8])
        x[:, :, 0].zero_()
        return self.fc(x.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ activations


@network(eager=("own forward (Activations)", "cat"))
class Activations(nn.Module):
    """A ModuleDict of activations, one behind each of as many convolutions of the same maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8, stride=2)
        self.activations = nn.ModuleDict(
            {
                "silu": nn.SiLU(),
                "mish": nn.Mish(),
                "elu": nn.ELU(),
                "leaky": nn.LeakyReLU(0.2),
                "prelu": nn.PReLU(8),
                "hardswish": nn.Hardswish(inplace=True),
                "hardsigmoid": nn.Hardsigmoid(),
                "softplus": nn.Softplus(),
                "celu": nn.CELU(),
                "selu": nn.SELU(),
                "hardtanh": nn.Hardtanh(-1.0, 2.0),
                "relu6": nn.ReLU6(inplace=True),
                "gelu": nn.GELU(),
                "logsigmoid": nn.LogSigmoid(),
            }
        )
        self.convs = nn.ModuleDict({name: nn.Conv2d(8, 8, 3, padding=1) for name in self.activations})
        self.fc = nn.Linear(8 * len(self.activations), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        answers = [activation(self.convs[name](x)) for name, activation in self.activations.items()]
        return self.fc(torch.cat([answer.mean((2, 3)) for answer in answers], dim=1))


@network(eager=("own forward (Gates)", "mul"))
class Gates(nn.Module):
    """Gated linear units, x * sigmoid(x) and x * tanh(softplus(x)) written out, a hard sigmoid of relu6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.glu = nn.GLU(dim=1)
        self.relu6 = nn.ReLU6()
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(16, 2 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.glu(self.conv1(x))
        x = self.conv2(x)
        x = x * self.sigmoid(x)
        x = self.conv3(x)
        x = x * self.relu6(x + 3) / 6
        x = x * torch.tanh(F.softplus(x))
        return F.glu(self.fc(x.mean((2, 3))), dim=-1)


@network(eager=("own forward (Rectifiers)", "neg"))
class Rectifiers(nn.Module):
    """CReLU by cat, Maxout by maximum, soft thresholding by sign and abs, and a leaky ReLU by torch.where."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(8, 16, 1)
        self.threshold = nn.Parameter(torch.full((16, 1, 1), 0.3))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu(torch.cat((x, -x), 1))
        a, b = self.conv2(x).chunk(2, dim=1)
        x = self.conv3(torch.maximum(a, b))
        x = torch.sign(x) * F.relu(torch.abs(x) - self.threshold)
        x = torch.where(x > 0, x, 0.1 * x)
        return self.fc(x.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ residuals


@network(eager=("own forward (ScaledResiduals)", "mul"))
class ScaledResiduals(nn.Module):
    """ReZero by a scalar, LayerScale by a vector, a fixed number, and a subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.a, self.b, self.c, self.d = (
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)) for _ in range(4)
        )
        self.alpha = nn.Parameter(torch.zeros(()))
        self.gamma = nn.Parameter(torch.full((1, 16, 1, 1), 0.5))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.alpha * self.a(x))
        x = torch.add(x, self.b(x) * self.gamma).relu()
        x = torch.add(x, self.c(x), alpha=0.2).relu_()
        x = F.relu(x - self.d(x))
        return self.fc(x.mean((2, 3)))


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    if p == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= p
    return x * keep / (1 - p)


@network(eager=("own forward (StochasticDepth)", "add"))
class StochasticDepth(nn.Module):
    """Branches that training drops: a function that looks at `training`, and torchvision's module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.a, self.b = (nn.Sequential(conv_bn_relu(16, 16), nn.Conv2d(16, 16, 1)) for _ in range(2))
        self.drop = torchvision.ops.StochasticDepth(0.2, "row")
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + drop_path(self.a(x), 0.1, self.training)
        x = x + self.drop(self.b(x))
        return self.fc(x.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ decoders, padding


@network(eager=("own forward (UNet)", "cat"))
class UNet(nn.Module):
    """Transposed convolutions and bilinear upsampling, with the encoder's maps joined on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = conv_bn_relu(3, 8), conv_bn_relu(8, 16), conv_bn_relu(16, 16)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.dec2 = conv_bn_relu(24, 16)
        self.up1 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(16, 8, 1))
        self.dec1 = conv_bn_relu(16, 8)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in (self.enc1, self.enc2):
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.up2(self.enc3(x))
        x = self.dec2(torch.cat([skips.pop(), x], dim=1))
        x = self.dec1(torch.cat([skips.pop(), self.up1(x)], dim=1))
        return self.out(x).mean((2, 3))


@network(eager=("own forward (FeaturePyramid)", "add"))
class FeaturePyramid(nn.Module):
    """Maps of three depths in an OrderedDict, merged from the top by nearest upsampling (FPN)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {"c1": conv_bn_relu(3, 8), "c2": conv_bn_relu(8, 16, stride=2), "c3": conv_bn_relu(16, 16, stride=2)}
        )
        self.lateral = nn.ModuleDict({name: nn.Conv2d(c, 8, 1) for name, c in (("c1", 8), ("c2", 16), ("c3", 16))})
        self.smooth = nn.ModuleDict({name: nn.Conv2d(8, 8, 3, padding=1) for name in ("c1", "c2", "c3")})
        self.fc = nn.Linear(24, CLASSES)

    def backbone(self, x: Tensor) -> dict[str, Tensor]:
        out = OrderedDict()
        for name, block in self.body.items():
            x = block(x)
            out[name] = x
        return out

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        merged: dict[str, Tensor] = {}
        last: Tensor | None = None
        for name in reversed(list(features)):
            inner = self.lateral[name](features[name])
            if last is not None:
                inner = inner + F.interpolate(last, size=inner.shape[-2:])
            last = inner
            merged[name] = self.smooth[name](inner)
        return self.fc(torch.cat([m.mean((2, 3)) for m in merged.values()], dim=1))


@network(eager="circular")
class Paddings(nn.Module):
    """Reflected, replicated, circular, one-sided, "same" and constant padding."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(8, 8, (3, 5), padding="same", dilation=2)
        self.strided = nn.Conv2d(8, 8, 3, stride=2)
        self.valid = nn.Conv2d(8, 8, 3, padding="valid")
        self.constant = nn.ConstantPad2d(1, 0.5)
        self.replicate = nn.ReplicationPad2d((1, 0, 1, 0))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.reflect(x)))
        x = F.relu(self.same(F.relu(self.circular(x))))
        x = F.relu(self.strided(F.pad(x, (0, 1, 0, 1))))
        x = self.valid(self.constant(self.replicate(x)))
        x = F.max_pool2d(F.pad(x, [1, 1, 1, 1], value=-1.0), 3, 2)
        return self.fc(x.mean((2, 3)))


@network(eager=("own forward (AtrousPyramid)", "cat"))
class AtrousPyramid(nn.Module):
    """Dilated branches and a pooled one that is spread over the map again, joined by cat (ASPP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        rates = [nn.Conv2d(16, 8, 3, padding=r, dilation=r, bias=False) for r in (1, 2, 3)]
        self.convs = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()) for conv in rates])
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.project = conv_bn_relu(32, 16, 1)
        self.classifier = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        results = [conv(x) for conv in self.convs]
        pooled = F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.project(torch.cat([*results, pooled], dim=1))).flatten(2).mean(-1)


class Stage(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = F.relu(block(x) + x)
        return x


@network(eager=("module stage (Stage)", "add"))
class GroupedStages(nn.Module):
    """Grouped and depthwise convolutions in a Sequential whose forward adds residuals; blocks made by a function."""

    def __init__(self) -> None:
        super().__init__()

        def block(groups: int) -> nn.Sequential:
            return nn.Sequential(
                conv_bn_relu(16, 32, 1),
                conv_bn_relu(32, 32, groups=groups),
                nn.Conv2d(32, 16, 1, bias=False),
                nn.BatchNorm2d(16),
            )

        self.stem = conv_bn_relu(3, 16, stride=2)
        self.stage = Stage(OrderedDict(first=block(8), second=block(32)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)))


# ------------------------------------------------------------------------------------------------ constants, masks


@network(eager=("own forward (Coordinates)", "linspace"))
class Coordinates(nn.Module):
    """Two maps of coordinates, made in forward, are joined to the image (CoordConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_relu(5, 16, stride=2), conv_bn_relu(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(y, torch.linspace(-1, 1, w, device=x.device), indexing="ij"))
        x = torch.cat([x, grid.unsqueeze(0).expand(n, -1, -1, -1)], dim=1)
        return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))


@network(eager=("own forward (PositionalCode)", "sub"))
class PositionalCode(nn.Module):
    """Sines of torch.arange, made in forward, are added to the tokens; images are normalised with buffers first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.9, 1.0, 1.1]).view(1, 3, 1, 1), persistent=False)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.linear1, self.linear2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches((x - self.mean) / self.std).flatten(2).transpose(1, 2)
        position = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, x.shape[2], 2, device=x.device) * (-math.log(100.0) / x.shape[2]))
        code = torch.cat([torch.sin(position * frequency), torch.cos(position * frequency)], dim=1)
        x = x + code
        x = x + self.linear2(self.linear1(x).relu())
        return self.head(x.mean(dim=1))


@network(eager=("own forward (Coupling)", "mul"))
class Coupling(nn.Module):
    """Affine coupling with a checkerboard of torch.where and masked_fill (RealNVP)."""

    def __init__(self) -> None:
        super().__init__()
        board = (torch.arange(SIZE)[:, None] + torch.arange(SIZE)[None]) % 2
        self.register_buffer("mask", board.bool())
        self.net = nn.Sequential(conv_bn_relu(3, 16), nn.Conv2d(16, 6, 3, padding=1))
        self.last = conv_bn_relu(3, 16, stride=2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        kept = x.masked_fill(self.mask, 0.0)
        log_scale, shift = self.net(kept).chunk(2, dim=1)
        x = torch.where(self.mask, x * torch.exp(0.5 * torch.tanh(log_scale)) + shift, x)
        return self.fc(self.last(x).mean((2, 3)))


@network(eager=("own forward (SpatialTransformer)", "mul"))
class SpatialTransformer(nn.Module):
    """The image is resampled by an affine grid that a small network computes from it."""

    def __init__(self) -> None:
        super().__init__()
        self.localise = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6), nn.Tanh())
        self.register_buffer("identity", torch.tensor([1.0, 0, 0, 0, 1, 0]))
        self.features = nn.Sequential(conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        theta = (self.identity + 0.1 * self.localise(x)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.size()), align_corners=False), align_corners=False)
        return self.fc(self.features(x).mean((2, 3)))


@network(eager=("own forward (ConditionalConv)", "softmax"))
class ConditionalConv(nn.Module):
    """Each image has weights of its own, mixed from experts by a softmax; one grouped convolution does them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8, stride=2)
        self.routing = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.zeros(3, 8, 8, 3, 3))
        self.last = conv_bn_relu(8, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        routes = F.softmax(self.routing(x.mean((2, 3))), dim=1)
        weight = (routes @ self.experts.flatten(1)).view(b * 8, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b).view(b, 8, h, w)
        return self.fc(self.last(x).mean((2, 3)))


# ------------------------------------------------------------------------------------------------ heads


@network()
class ConvolutionalHead(nn.Module):
    """No linear layer: a convolution as large as the map, a 1×1 one behind it, and squeeze."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16, stride=2))
        self.full = nn.Conv2d(16, 24, 4)
        self.act = nn.Hardswish()
        self.logits = nn.Conv2d(24, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.act(self.full(self.features(x)))).squeeze(-1).squeeze(-1)


@network(eager=("own forward (CosineClassifier)", "linalg_vector_norm"))
class CosineClassifier(nn.Module):
    """Logits are cosines with normalised weights, scaled by the exponential of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 16, stride=2), nn.Conv2d(16, 24, 3, padding=1))
        self.weight = nn.Parameter(torch.zeros(CLASSES, 24))
        self.logit_scale = nn.Parameter(torch.ones([]) * 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        return self.logit_scale.exp() * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


@network(eager=("own forward (Prototypes)", "cdist_forward"))
class Prototypes(nn.Module):
    """Logits are distances to prototypes, negated; log_softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *[nn.Sequential(conv_bn_relu(c, 16), nn.MaxPool2d(2)) for c in (3, 16)], nn.Conv2d(16, 8, 1)
        )
        self.prototypes = nn.Parameter(torch.zeros(CLASSES, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x).flatten(2).max(dim=2).values
        return F.log_softmax(-torch.cdist(x, 5 * self.prototypes), dim=1)


class Outputs(NamedTuple):
    logits: Tensor
    features: Tensor
    gate: Tensor | None = None


@network(eager=("own forward (Experts)", "stack"))
class Experts(nn.Module):
    """A NamedTuple inside, experts stacked and weighed by a softmax gate, LogSoftmax as the last module."""

    def __init__(self) -> None:
        super().__init__()
        act = partial(nn.LeakyReLU, negative_slope=0.1)
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), act(), nn.Conv2d(16, 16, 3, 2, 1), act())
        self.experts = nn.ModuleList([nn.Linear(16, CLASSES) for _ in range(3)])
        self.gate = nn.Sequential(nn.Linear(16, 3), nn.Softmax(dim=-1))
        self.log_softmax = nn.LogSoftmax(dim=1)

    def outputs(self, x: Tensor) -> Outputs:
        features = self.trunk(x).mean((2, 3))
        gate = self.gate(features)
        answers = torch.stack([expert(features) for expert in self.experts], dim=2)
        return Outputs(torch.matmul(answers, gate.unsqueeze(-1)).squeeze(-1), features, gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax(self.outputs(x).logits)


@network(eager=("own forward (DeepSupervision)", "amax"))
class DeepSupervision(nn.Module):
    """Auxiliary heads that only training calls, and a dict of outputs of which one is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16)
        self.aux = nn.Sequential(conv_bn_relu(16, 8), nn.Conv2d(8, CLASSES, 1))
        self.heads = nn.ModuleDict({"coarse": nn.Linear(16, CLASSES), "fine": nn.Linear(16, CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        out: dict[str, Tensor] = {}
        x = self.layer1(x)
        if self.training:
            out["aux"] = self.aux(x).mean((2, 3))
        pooled = {"coarse": x.amax((2, 3)), "fine": self.layer2(x).mean((2, 3))}
        out.update({name: head(pooled[name]) for name, head in self.heads.items()})
        return (out["coarse"] + out["fine"]).mul(0.5)


# ------------------------------------------------------------------------------------------------ for the eager flow


class QuantizableBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.skip = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip.add_relu(x, self.conv2(self.conv1(x)))


@network()
class QuantizableResNet(nn.Module):
    """The tutorial's pattern: stubs, FloatFunctional for sums, cat and products, and a fuse_model of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.blocks = nn.Sequential(QuantizableBlock(16), QuantizableBlock(16))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.join, self.scale = FloatFunctional(), FloatFunctional()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.quant(x))
        y = self.blocks(x)
        y = self.scale.mul(y, self.gate(y))
        x = self.pool(self.join.cat([x, y], dim=1))
        return self.dequant(self.fc(torch.flatten(x, 1)))

    def fuse_model(self) -> None:
        for part in self.modules():
            if type(part) is nn.Sequential and isinstance(part[0], nn.Conv2d):
                fuse_modules(part, [str(i) for i in range(len(part))], inplace=True)


@network()
class ModuleChain(nn.Module):
    """Modules one after the other, each of another kind: norms, activations and poolings that have INT8 modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 16, 3, padding=1),
                norm1=nn.GroupNorm(4, 16),
                elu=nn.ELU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(16, 16, 3, padding=1, groups=4),
                norm2=nn.InstanceNorm2d(16, affine=True),
                leaky=nn.LeakyReLU(0.1),
                conv3=nn.Conv2d(16, 16, 3, padding=1),
                norm3=nn.BatchNorm2d(16),
                hardswish=nn.Hardswish(),
                norm4=nn.BatchNorm2d(16),
                dropout=nn.Dropout(),
                upsample=nn.Upsample(scale_factor=2),
                transposed=nn.ConvTranspose2d(16, 24, 3, stride=1, padding=1),
                relu6=nn.ReLU6(),
                conv4=nn.Conv2d(24, 16, (1, 3), stride=(1, 2)),
                sigmoid=nn.Sigmoid(),
                pool2=nn.AdaptiveAvgPool2d((2, 2)),
                flatten=nn.Flatten(),
                norm5=nn.LayerNorm(64),
                linear=nn.Linear(64, CLASSES),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@network(eager=("own forward (PlainVGG)", "view"))
class PlainVGG(nn.Module):
    """Convolutions, ReLU and max pooling in one Sequential that a loop makes; two linear layers behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, "M", 16, "M", 16, 16, "A"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2) if width == "M" else nn.AvgPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.ReLU(True), nn.Dropout(p=0.5), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


# ------------------------------------------------------------------------------------------------ ways of writing


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return gradient * (sigmoid * (1 + x * (1 - sigmoid)))


class MemoryEfficientSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SwishFunction.apply(x)


@network(eager=("module swish (MemoryEfficientSwish)", "mul"))
class OwnFunction(nn.Module):
    """An activation that is a torch.autograd.Function, as EfficientNet's first package had it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.swish = nn.Conv2d(16, 16, 3, padding=1), MemoryEfficientSwish()
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.bn1(self.conv1(x)))
        return self.fc(self.swish(self.conv2(x)).mean((2, 3)))


@network(eager=("own forward (FunctionalNorms)", "native_group_norm"))
class FunctionalNorms(nn.Module):
    """Group, layer and instance norm, Hardswish, ELU, Hardsigmoid and Softplus from torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16, 16))
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(F.group_norm(self.conv1(x), 4, self.weight, self.bias))
        x = F.elu(F.instance_norm(F.max_pool2d(self.conv2(x), 2)))
        x = F.layer_norm(self.conv3(x).permute(0, 2, 3, 1), (16,), self.weight, eps=1e-6).permute(0, 3, 1, 2)
        y = self.conv4(x)
        x = x + F.hardsigmoid(y) * F.softplus(y)
        return self.fc(x.mean((2, 3)))


@network(eager=("own forward (Assertive)", "to_copy"))
class Assertive(nn.Module):
    """Checks of shapes, types and modes in forward, and a checkpointed block where gradients are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.use_checkpoint = True
        self.conv1, self.conv2 = conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor), "an image"
        assert x.dim() == 4, f"a batch of images, not {x.shape}"
        assert x.shape[1] == 3
        torch._assert(x.size(2) == x.size(3), "square")
        if x.dtype != torch.float32:
            x = x.float()
        x = self.conv1(x)
        if self.use_checkpoint and x.requires_grad and not torch.jit.is_scripting():
            x = torch.utils.checkpoint.checkpoint(self.conv2, x, use_reentrant=False)
        else:
            x = self.conv2(x)
        return self.fc(x.mean((2, 3)))


@network(eager="Conversions")
class Conversions(nn.Module):
    """to, float, type_as, clone, detach and memory formats, of which none computes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.conv1(x.float())
        skip = x.clone().detach()
        x = self.conv2(x).to(memory_format=torch.contiguous_format) + skip.type_as(x)
        return self.fc(x.mean((2, 3)).to(torch.float32)).cpu()


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@network(eager=("module gray (Lambda)", "mul"))
class Lambdas(nn.Module):
    """Layers that hold a function; layers found by getattr with a number in their name."""

    def __init__(self) -> None:
        super().__init__()
        for i, (channels, width) in enumerate([(1, 8), (8, 16), (16, 16)]):
            self.add_module(f"layer{i}", conv_bn_relu(channels, width, stride=1 + i % 2))
        self.gray = Lambda(lambda x: 0.3 * x[:, :1] + 0.6 * x[:, 1:2] + 0.1 * x[:, 2:])
        self.head = nn.Sequential(Lambda(lambda x: x.mean(dim=[-2, -1])), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.gray(x)
        for i in range(3):
            x = getattr(self, f"layer{i}")(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


@network(eager=("module block.0 (Residual)", "add"))
class ConvMixer(nn.Module):
    """A wrapper that adds what goes in to what comes out; BatchNorm behind the activation, where it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), nn.GELU(), nn.BatchNorm2d(16))
        depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, groups=16, padding="same"), nn.GELU(), nn.BatchNorm2d(16))
        self.block = nn.Sequential(Residual(depthwise), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


@network(eager=("own forward (TappedBackbone)", "mul"))
class TappedBackbone(nn.Module):
    """A Sequential that is sliced and enumerated, features kept on the way, merged by weights that add up to one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 16), nn.MaxPool2d(2), conv_bn_relu(16, 16), nn.Identity()
        )
        self.taps = {0, 1}
        self.weights = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features[0](x)
        kept = [x]
        for i, layer in enumerate(self.features[1:]):
            x = layer(x)
            if i in self.taps and i < 1:
                kept.append(x)
        kept.append(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        merged = sum(weight * feature for weight, feature in zip(weights, kept, strict=True))
        return self.fc(merged.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ rarer operations


@network()
class TransposedDecoder(nn.Module):
    """Transposed convolutions of several kinds: overlapping, grouped, dilated, with output_padding, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 32, stride=2))
        self.up1 = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.up2 = nn.Sequential(nn.ConvTranspose2d(16, 16, 3, 1, 1, groups=4), nn.ReLU())
        self.up3 = nn.Sequential(nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1), nn.LeakyReLU(0.2))
        self.up4 = nn.ConvTranspose2d(8, 8, 3, dilation=2, padding=2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up3(self.up2(self.up1(self.encode(x))))
        return self.fc(torch.tanh(self.up4(x)).mean((2, 3)))


@network(eager=("own forward (FeatureModulation)", "add"))
class FeatureModulation(nn.Module):
    """Scales and shifts that a small network computes from the pooled maps (FiLM), by chunk and None indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn_relu(3, 16, stride=2), nn.Conv2d(16, 16, 3, padding=1)
        self.condition = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 32))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gamma, beta = self.condition(x.mean((2, 3))).chunk(2, dim=-1)
        x = F.relu(self.conv(x) * (1 + gamma[..., None, None]) + beta[:, :, None, None])
        return self.fc(x.mean((2, 3)))


@network(eager=("module unfold (Unfold)", "im2col"))
class Involution(nn.Module):
    """Kernels computed for each pixel, applied to unfolded maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, stride=2)
        self.reduce, self.span = conv_bn_relu(16, 4, 1), nn.Conv2d(4, 2 * 9, 1)
        self.unfold = nn.Unfold(3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        weight = self.span(self.reduce(x)).view(b, 2, 9, h, w).unsqueeze(2)
        out = self.unfold(x).view(b, 2, c // 2, 9, h, w)
        out = (weight * out).sum(dim=3).view(b, c, h, w)
        return self.fc(F.relu(out).mean((2, 3)))


@network(eager=("own forward (SoftArgmax)", "mul"))
class SoftArgmax(nn.Module):
    """Keypoints as expectations over pixels: softmax, products with coordinate buffers, sums, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu(3, 16, stride=2), nn.Conv2d(16, 8, 3, padding=1))
        self.register_buffer("position", torch.linspace(-1, 1, 8))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        heat = torch.softmax((maps * self.temperature).flatten(2), dim=-1).view_as(maps)
        column = (heat.sum(dim=2) * self.position).sum(dim=-1)
        row = (heat.sum(dim=3) * self.position).sum(dim=-1)
        return self.fc(torch.hstack((column, row)))


@network(eager=("own forward (TokenSelection)", "gather"))
class TokenSelection(nn.Module):
    """The highest tokens by topk and gather, and a one-hot gate of argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.score = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 1)
        self.experts = nn.ModuleList([nn.Linear(16, CLASSES) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        values, index = self.score(x).squeeze(-1).topk(4, dim=1)
        x = torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, 16))
        x = (x * torch.sigmoid(values).unsqueeze(-1)).sum(1)
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


@network(eager=("own forward (FourierMixer)", "to_copy"))
class FourierMixer(nn.Module):
    """Tokens mixed by a Fourier transform and complex weights (GFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.filter = nn.Parameter(torch.ones(16, 8, 5, 2))
        self.conv = conv_bn_relu(16, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        x = x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")
        return self.fc(self.conv(x).mean((2, 3)))


@network(eager="RowMemory")
class RowMemory(nn.Module):
    """An LSTM reads the rows of the map, a GRU the channels' means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8, stride=2)
        self.lstm = nn.LSTM(64, 16, batch_first=True)
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows, _ = self.lstm(x.permute(0, 2, 1, 3).flatten(2))
        _, last = self.gru(x.mean(3).permute(0, 2, 1))
        return self.fc(torch.cat([rows[:, -1], last[0]], dim=1))


@network(eager="module bilinear (Bilinear)")
class PairwiseHead(nn.Module):
    """nn.Bilinear and nn.CosineSimilarity as heads, parameters in a ParameterList, logits scaled and shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn_relu(3, 8, stride=2), conv_bn_relu(3, 8, 5, stride=2)
        self.bilinear = nn.Bilinear(8, 8, CLASSES)
        self.similarity = nn.CosineSimilarity(dim=1)
        self.affine = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(CLASSES))])

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).mean((2, 3)), self.right(x).mean((2, 3))
        logits = self.bilinear(left, right) + self.similarity(left, right).unsqueeze(1)
        return logits * self.affine[0] + self.affine[1]
