"""A probe of this machine's INT8 kernels at the extremes: the kernel signature, and the guard that follows from it.

Without VNNI, x86 kernels multiply u8 by s8 and add pairs of products in 16 bits, which saturate silently. Whether they
do depends on the kernel, not on the CPU alone, so the kernels are tried rather than looked up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexp.config.schema import Engine, FlowName, Overflow, QConfig, Scheme, Target
from qexp.errors import InputError
from qexp.quantize.calibration.grid import SAFE_BITS
from qexp.quantize.torch_backend.deprecations import silence_first_warning
from qexp.quantize.torch_backend.engines import engine, supported
from qexp.system import machine

EXACT = 200
"""The output code of a kernel with exact accumulators."""

_CONVOLUTIONS = {
    # name: (channels in, channels out, kernel size, groups)
    "conv": (16, 16, 3, 1),
    "stem": (3, 16, 3, 1),
    "pointwise": (64, 16, 1, 1),
    "grouped": (32, 32, 3, 4),
    "depthwise": (16, 16, 3, 16),
    "depthwise_5x5": (16, 16, 5, 16),
    # x86 passes a convolution of more than 100 groups to FBGEMM even if the CPU has VNNI.
    "depthwise_wide": (128, 128, 3, 128),
}
# From probed layers to the kind that they stand for, where the names differ.
_BROADER = {"stem": "conv", "depthwise_5x5": "depthwise", "depthwise_wide": "depthwise"}
_LINEAR_FEATURES = 64
KINDS = frozenset({"conv", "conv_transpose", "pointwise", "grouped", "depthwise", "linear"})
"""The kinds of layer that `emulation` distinguishes."""
_SATURATES_ON_AVX2 = (Engine.x86, Engine.fbgemm, Engine.onednn)


@dataclass(frozen=True)
class Probe:
    """The output code of one kernel, where the exact code is 200."""

    engine: Engine
    weight_scheme: Scheme
    kind: str
    output: int

    @property
    def saturates(self) -> bool:
        # onednn's depthwise kernels are off by one step, which is rounding.
        return abs(self.output - EXACT) > 1


@dataclass(frozen=True)
class KernelSignature:
    """`id` is the same on machines whose INT8 kernels had the same outputs, and short enough for a tag."""

    id: str
    probes: tuple[Probe, ...]

    def saturating_kinds(self, name: Engine, weight_scheme: Scheme = Scheme.symmetric) -> tuple[str, ...]:
        """Return the kinds of layer (conv, depthwise, linear, …) in which this engine saturates."""
        mine = [p for p in self.probes if p.engine is name and p.weight_scheme is weight_scheme]
        return tuple(p.kind for p in mine if p.saturates)

    def dense_saturates(self, name: Engine, weight_scheme: Scheme = Scheme.symmetric) -> bool:
        """True if ordinary convolutions saturate, as they do on a CPU without VNNI."""
        return "conv" in self.saturating_kinds(name, weight_scheme)


@cache
def probe() -> KernelSignature:
    """Run each kind of layer on each engine with activations of 255 and weights of 127 (tens of ms, once a process)."""
    silence_first_warning()
    probes: list[Probe] = []
    for name in supported():
        with engine(name), torch.inference_mode():
            for scheme in Scheme:
                # onednn supports only weights with a zero point of 0.
                if scheme is Scheme.symmetric or name is not Engine.onednn:
                    zero_point = 0 if scheme is Scheme.symmetric else -1
                    probes += [Probe(name, scheme, kind, _conv(kind, zero_point)) for kind in _CONVOLUTIONS]
                    probes.append(Probe(name, scheme, "linear", _linear(zero_point)))
    text = ";".join(f"{p.engine}.{p.weight_scheme}.{p.kind}={p.output}" for p in probes)
    return KernelSignature(hashlib.sha256(text.encode()).hexdigest()[:12], tuple(probes))


def _conv(kind: str, zero_point: int) -> int:
    channels_in, channels_out, size, groups = _CONVOLUTIONS[kind]
    images = torch.quantize_per_tensor(torch.full((1, channels_in, 8, 8), 255.0), 1.0, 0, torch.quint8)
    shape = (channels_out, channels_in // groups, size, size)
    weight, terms = _weight(shape, zero_point), channels_in // groups * size * size
    # FBGEMM has special kernels for groups, which accumulate in another order, and takes them only with this padding.
    padding = [size // 2, size // 2]
    packed = torch.ops.quantized.conv2d_prepack(weight, torch.zeros(channels_out), [1, 1], padding, [1, 1], groups)
    output = torch.ops.quantized.conv2d(images, packed, _scale(terms, zero_point), 0)
    return _lowest(output[..., size // 2 : -(size // 2) or None, size // 2 : -(size // 2) or None])


def _linear(zero_point: int) -> int:
    features = torch.quantize_per_tensor(torch.full((1, _LINEAR_FEATURES), 255.0), 1.0, 0, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(_weight((16, _LINEAR_FEATURES), zero_point), torch.zeros(16))
    return _lowest(torch.ops.quantized.linear(features, packed, _scale(_LINEAR_FEATURES, zero_point), 0))


def _weight(shape: tuple[int, ...], zero_point: int) -> Tensor:
    """Return int8 weights whose codes are all 127."""
    return torch.quantize_per_tensor(torch.full(shape, 127.0 - zero_point), 1.0, zero_point, torch.qint8)


def _scale(terms: int, zero_point: int) -> float:
    return terms * 255 * (127 - zero_point) / EXACT


def _lowest(output: Tensor) -> int:
    return int(output.int_repr().min())


def overflowing_kinds(
    qconfig: QConfig, name: Engine, flow: FlowName, target: Target, signature: KernelSignature
) -> frozenset[str]:
    """Return the kinds of layer (of KINDS) whose 16-bit accumulators can overflow with full grids on the target CPU.

    A flow in which the guard has no effect has none: torch's dynamic linear layer reduces activations to 7 bits itself.
    A CPU with VNNI may have some: FBGEMM's depthwise kernels accumulate in 16 bits everywhere.
    """
    if "qconfig.overflow" in flow.ignores or target is Target.vnni:
        return frozenset()
    if target is Target.avx2:
        return KINDS if name in _SATURATES_ON_AVX2 else frozenset()
    return saturating_here(name, qconfig.weight.scheme, signature)


def saturating_here(name: Engine, weight_scheme: Scheme, signature: KernelSignature) -> frozenset[str]:
    """Return the kinds of layer (of KINDS) in which the kernels of a machine saturate with full grids."""
    here = signature.saturating_kinds(name, weight_scheme)
    # By prefix: conv also stands for conv_transpose, which isn't probed.
    return frozenset(kind for kind in KINDS for probed in here if kind.startswith(_BROADER.get(probed, probed)))


def saturating(codes: Mapping[str, int]) -> frozenset[str]:
    """Return the kinds of layer (of KINDS) in which another library's kernels saturate.

    codes: its answers, by the kinds that are probed (see `probed_layers`). conv doesn't stand for conv_transpose, which
    such a library may execute in FP32.
    """
    return frozenset(_BROADER.get(kind, kind) for kind, code in codes.items() if abs(code - EXACT) > 1)


def probed_layers() -> dict[str, tuple[int, int, int, int]]:
    """Return the layers that are probed, by kind: channels in and out, kernel size and groups; 0 and 1 for linear."""
    return {**_CONVOLUTIONS, "linear": (_LINEAR_FEATURES, 16, 0, 1)}


@dataclass(frozen=True)
class Kernels:
    """A library's INT8 kernels, as far as their sums are concerned.

    name: in sentences, such as engine=x86 or onnxruntime; order: torch's engine whose kernels add up in the same order;
    here, there: the kinds of layer (of KINDS) in which 16-bit accumulators can overflow with full grids on this CPU,
    and on the target; of_torch: they are those of torch, which convert has packed the weights for.
    """

    name: str
    order: Engine
    here: frozenset[str]
    there: frozenset[str]
    of_torch: bool = False


def resolve_overflow(
    qconfig: QConfig,
    name: Engine,
    flow: FlowName,
    target: Target,
    signature: KernelSignature,
    others: Iterable[Kernels] = (),
) -> Overflow:
    """Return what `qconfig.overflow` means here: an explicit value as it is; for `auto` none or layers.

    others: kernels of other libraries that execute the model too.
    """
    if qconfig.overflow is not Overflow.auto:
        return qconfig.overflow
    reduced = min(qconfig.weight.bits, qconfig.activation.bits) <= SAFE_BITS
    by_torch = flow.executed_by_torch and overflowing_kinds(qconfig, name, flow, target, signature)
    return Overflow.layers if not reduced and (by_torch or any(one.there for one in others)) else Overflow.none


# Environment variables that lower the instruction set of a library with INT8 kernels.
_LOWERED_BY = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "FBGEMM_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE", "AVX512", "DEFAULT")


def check_environment(name: Engine, signature: KernelSignature, environment: Mapping[str, str]) -> None:
    """Raise InputError if an environment variable asks for a CPU without VNNI and this process's kernels still use it.

    Such a variable affects a single library, and not every version of it.
    """
    for variable in _LOWERED_BY:
        value = environment.get(variable, "")
        if value.upper() in _WITHOUT_VNNI and name in _SATURATES_ON_AVX2 and not signature.dense_saturates(name):
            raise InputError(
                f"{variable}={value} asks for a CPU without VNNI, and the kernels of engine={name} are still those of "
                "one with it: unset it, and use target=avx2, which emulates such a CPU."
            )


def computed_by(threads: int) -> list[Any]:
    """Return everything about this machine and its libraries that changes the last bits of results, for a cache's key.

    threads: torch's.
    """
    here = machine.describe()
    return [threads, torch.__version__, here.cpu, here.isa, probe().id, machine.numerics_environment()]
