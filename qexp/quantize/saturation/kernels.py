"""What this machine's INT8 kernels do at the extremes: the kernel signature, and the guard that follows from it.

Without VNNI, x86 kernels multiply u8 by s8 and add pairs of products in 16 bits, which saturate without a word. That
belongs to the kernel, not to the CPU, so it is tried rather than looked up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexp.config.schema import Engine, FlowName, Overflow, QConfig, Scheme, Target
from qexp.errors import InputError
from qexp.quantize.calibration.grid import SAFE_BITS
from qexp.quantize.torch_backend.deprecations import say_once_silently
from qexp.quantize.torch_backend.engines import engine, supported
from qexp.system import machine

EXACT = 200
"""The answer of a kernel that adds up exactly."""

_CONVOLUTIONS = {
    # name: (channels in, channels out, kernel size, groups)
    "conv": (16, 16, 3, 1),
    "stem": (3, 16, 3, 1),
    "pointwise": (64, 16, 1, 1),
    "grouped": (32, 32, 3, 4),
    "depthwise": (16, 16, 3, 16),
    "depthwise_5x5": (16, 16, 5, 16),
    # x86 hands a convolution of more than 100 groups to FBGEMM even where it has VNNI.
    "depthwise_wide": (128, 128, 3, 128),
}
# What was tried, and the kind of layer that it stands for, where the two have other names.
_BROADER = {"stem": "conv", "depthwise_5x5": "depthwise", "depthwise_wide": "depthwise"}
_LINEAR_FEATURES = 64
KINDS = frozenset({"conv", "conv_transpose", "pointwise", "grouped", "depthwise", "linear"})
"""The kinds of layer that `sums` tells apart."""
_SATURATES_ON_AVX2 = (Engine.x86, Engine.fbgemm, Engine.onednn)


@dataclass(frozen=True)
class Probe:
    """What one kernel answered where the exact answer is 200."""

    engine: Engine
    weight_scheme: Scheme
    kind: str
    answer: int

    @property
    def saturates(self) -> bool:
        # One step is rounding, of which onednn's depthwise kernels have one.
        return abs(self.answer - EXACT) > 1


@dataclass(frozen=True)
class KernelSignature:
    """`id` is the same on machines whose INT8 kernels answered the same, and short enough for a tag."""

    id: str
    probes: tuple[Probe, ...]

    def saturating_kinds(self, name: Engine, weight_scheme: Scheme = Scheme.symmetric) -> tuple[str, ...]:
        """Kinds of layer (conv, depthwise, linear, …) in which this engine saturates."""
        mine = [p for p in self.probes if p.engine is name and p.weight_scheme is weight_scheme]
        return tuple(p.kind for p in mine if p.saturates)

    def dense_saturates(self, name: Engine, weight_scheme: Scheme = Scheme.symmetric) -> bool:
        """Whether ordinary convolutions saturate, as they do on a CPU without VNNI."""
        return "conv" in self.saturating_kinds(name, weight_scheme)


@cache
def probe() -> KernelSignature:
    """Run each kind of layer on each engine with activations of 255 and weights of 127 (tens of ms, once a process)."""
    say_once_silently()
    probes: list[Probe] = []
    for name in supported():
        with engine(name), torch.inference_mode():
            for scheme in Scheme:
                # onednn takes weights with a zero point of 0 only.
                if scheme is Scheme.symmetric or name is not Engine.onednn:
                    zero_point = 0 if scheme is Scheme.symmetric else -1
                    probes += [Probe(name, scheme, kind, _conv(kind, zero_point)) for kind in _CONVOLUTIONS]
                    probes.append(Probe(name, scheme, "linear", _linear(zero_point)))
    text = ";".join(f"{p.engine}.{p.weight_scheme}.{p.kind}={p.answer}" for p in probes)
    return KernelSignature(hashlib.sha256(text.encode()).hexdigest()[:12], tuple(probes))


def _conv(kind: str, zero_point: int) -> int:
    channels_in, channels_out, size, groups = _CONVOLUTIONS[kind]
    images = torch.quantize_per_tensor(torch.full((1, channels_in, 8, 8), 255.0), 1.0, 0, torch.quint8)
    shape = (channels_out, channels_in // groups, size, size)
    weight, terms = _weight(shape, zero_point), channels_in // groups * size * size
    # FBGEMM has kernels of its own for groups, which add up otherwise, and takes them only with this padding.
    padding = [size // 2, size // 2]
    packed = torch.ops.quantized.conv2d_prepack(weight, torch.zeros(channels_out), [1, 1], padding, [1, 1], groups)
    output = torch.ops.quantized.conv2d(images, packed, _scale(terms, zero_point), 0)
    return _lowest(output[..., size // 2 : -(size // 2) or None, size // 2 : -(size // 2) or None])


def _linear(zero_point: int) -> int:
    features = torch.quantize_per_tensor(torch.full((1, _LINEAR_FEATURES), 255.0), 1.0, 0, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(_weight((16, _LINEAR_FEATURES), zero_point), torch.zeros(16))
    return _lowest(torch.ops.quantized.linear(features, packed, _scale(_LINEAR_FEATURES, zero_point), 0))


def _weight(shape: tuple[int, ...], zero_point: int) -> Tensor:
    """int8 weights that are all 127 as integers."""
    return torch.quantize_per_tensor(torch.full(shape, 127.0 - zero_point), 1.0, zero_point, torch.qint8)


def _scale(terms: int, zero_point: int) -> float:
    return terms * 255 * (127 - zero_point) / EXACT


def _lowest(output: Tensor) -> int:
    return int(output.int_repr().min())


def overflowing_kinds(
    qconfig: QConfig, name: Engine, flow: FlowName, target: Target, signature: KernelSignature
) -> frozenset[str]:
    """The kinds of layer (of KINDS) whose 16-bit sums can overflow with full grids on the CPU that `target` means.

    A flow in which the guard has no effect has none: torch's dynamic linear reduces activations to 7 bits itself. A CPU
    with VNNI may have some: FBGEMM's depthwise kernels add up in 16 bits everywhere.
    """
    if "qconfig.overflow" in flow.ignores or target is Target.vnni:
        return frozenset()
    if target is Target.avx2:
        return KINDS if name in _SATURATES_ON_AVX2 else frozenset()
    return saturating_here(name, qconfig.weight.scheme, signature)


def saturating_here(name: Engine, weight_scheme: Scheme, signature: KernelSignature) -> frozenset[str]:
    """The kinds of layer (of KINDS) in which the kernels of a machine saturate with full grids."""
    here = signature.saturating_kinds(name, weight_scheme)
    # By how it begins: what holds for conv does for conv_transpose, which isn't tried.
    return frozenset(kind for kind in KINDS for probed in here if kind.startswith(_BROADER.get(probed, probed)))


def resolve_overflow(
    qconfig: QConfig, name: Engine, flow: FlowName, target: Target, signature: KernelSignature
) -> Overflow:
    """What `qconfig.overflow` means here: an explicit value is kept, `auto` becomes none or layers."""
    if qconfig.overflow is not Overflow.auto:
        return qconfig.overflow
    narrow = min(qconfig.weight.bits, qconfig.activation.bits) <= SAFE_BITS
    if narrow or not overflowing_kinds(qconfig, name, flow, target, signature):
        return Overflow.none
    return Overflow.layers


# What lowers the instruction set of a library that computes in INT8.
_LOWERED_BY = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "FBGEMM_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE", "AVX512", "DEFAULT")


def check_environment(name: Engine, signature: KernelSignature, environment: Mapping[str, str]) -> None:
    """Refuse an environment that asks for a CPU without VNNI where the probe of this process does not find one.

    Such a variable reaches one library only, and not every version of it. Raises InputError.
    """
    for variable in _LOWERED_BY:
        value = environment.get(variable, "")
        if value.upper() in _WITHOUT_VNNI and name in _SATURATES_ON_AVX2 and not signature.dense_saturates(name):
            raise InputError(
                f"{variable}={value} asks for a CPU without VNNI, and the kernels of engine={name} are still those of "
                "one with it: unset it, and use target=avx2, which emulates such a CPU."
            )


def computed_by(threads: int) -> list[Any]:
    """Everything of this machine and its libraries that changes the last bits of what is computed here, for a cache's
    key. threads: of torch."""
    here = machine.describe()
    return [threads, torch.__version__, here.cpu, here.isa, probe().id, machine.library_environment()]
