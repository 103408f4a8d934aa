"""The kernel signature, the guard that follows from it, and known outputs, which hold with and without VNNI."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName, Overflow, QConfig, Scheme, Target
from qexp.quantize import FLOWS
from qexp.quantize.saturation.kernels import KINDS, KernelSignature, Probe, overflowing_kinds, probe, resolve_overflow
from tests.helpers.quantizable import settings, spec

ENGINES = [e for e in Engine if e in quantize.supported()]
EXACT = KernelSignature("exact", tuple(Probe(e, s, "conv", 200) for e in Engine for s in Scheme))
SATURATED = KernelSignature("saturated", tuple(Probe(e, s, "conv", 101) for e in Engine for s in Scheme))


def quantized(
    net: nn.Module, qconfig: QConfig, engine: Engine, images: Tensor, flow: FlowName = FlowName.eager
) -> nn.Module:
    fused = FLOWS[flow].fuse(net.eval(), spec(), images)
    prepared = FLOWS[flow].prepare(fused, spec(qconfig, engine=engine), images)
    quantize.calibrate(prepared, [images])
    model = FLOWS[flow].convert(prepared)
    if qconfig.overflow is Overflow.layers:
        model, _ = quantize.reduce_range(model, Target.native, images)
    return model.module


def run(net: nn.Module, engine: Engine, images: Tensor) -> Tensor:
    with quantize.engine(engine), torch.inference_mode():
        return net(images)


def resolved(qconfig: QConfig, engine: Engine, target: Target = Target.native) -> QConfig:
    return replace(qconfig, overflow=resolve_overflow(qconfig, engine, FlowName.eager, target, probe()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_576_ones_add_up_to_576_with_every_engine_by_default(engine: Engine, granularity: str) -> None:
    # 3x3 weights of 1 over 64 channels: if pairs of products saturate, the output is 289.
    conv = nn.Conv2d(64, 16, 3, bias=False)
    nn.init.ones_(conv.weight)
    images = torch.ones(1, 64, 8, 8)
    qconfig = resolved(settings(granularity, overflow="auto"), engine)
    output = run(quantized(nn.Sequential(conv), qconfig, engine, images), engine, images)
    assert output.shape == (1, 16, 6, 6)
    assert (output / 576 - 1).abs().max() < 0.01


LAYERS = {
    "conv": nn.Conv2d(16, 24, 3, padding=1, bias=False),
    "stem": nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False),
    "pointwise": nn.Conv2d(64, 40, 1, bias=False),
    "strided pointwise": nn.Conv2d(24, 48, 1, stride=2, bias=False),
    "depthwise": nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
    "depthwise 5x5": nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False),
    "wide depthwise": nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False),
    "grouped": nn.Conv2d(32, 64, 3, padding=1, groups=4, bias=False),
    "linear": nn.Linear(40, 30, bias=False),
}


def steps_from_exact(net: nn.Module, converted: nn.Module, images: Tensor, engine: Engine) -> Tensor:
    """The distance of each output of a converted layer from int32 accumulation, rounded once, in steps.

    float64 holds every sum of products exactly, far below 2^53. Where the exact value lies halfway between two steps,
    float32 may round to either: those count as equal. The layers have no biases, which FBGEMM adds in float32 and
    qnnpack as integers.
    """
    layer = converted.module[0]
    with quantize.engine(engine), torch.inference_mode():
        inputs = converted.quant(images)
        output = layer(inputs).int_repr().to(torch.float64)
    # The convolution itself, inside what takes its stride first where oneDNN can't be trusted with that.
    layer = getattr(layer, "conv", layer)
    weight = layer.weight()
    assert output.std() > 5
    values = inputs.int_repr().to(torch.float64) - inputs.q_zero_point()
    factors = weight.int_repr().to(torch.float64)
    scale = weight.q_per_channel_scales() * inputs.q_scale() / layer.scale
    if isinstance(net[0], nn.Linear):
        exact = values @ factors.T * scale + layer.zero_point
    else:
        sums = nn.functional.conv2d(values, factors, None, net[0].stride, net[0].padding, 1, net[0].groups)
        exact = sums * scale.view(1, -1, 1, 1) + layer.zero_point
    halfway = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert halfway.float().mean() < 0.01
    return torch.where(halfway, 0, output - exact.round().clamp(0, 255)).abs()


def layer_and_images(kind: str) -> tuple[nn.Module, Tensor]:
    layer = LAYERS[kind]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        # Mostly of one sign, which overflows 16-bit accumulators.
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) * 0.9 + 0.1)
    shape = (2, 40) if kind == "linear" else (2, layer.in_channels, 16, 16)
    images = torch.rand(shape, generator=generator)
    return nn.Sequential(layer), images


@pytest.mark.parametrize("kind", list(LAYERS))
def test_qnnpack_equals_int32_accumulation(kind: str) -> None:
    net, images = layer_and_images(kind)
    converted = quantized(net, settings("per_channel"), Engine.qnnpack, images)
    assert steps_from_exact(net, converted, images, Engine.qnnpack).max() == 0


@pytest.mark.parametrize("guard", ["weights", "activations", "layers"])
@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("engine", [e for e in ENGINES if e is not Engine.qnnpack])
def test_half_the_range_is_exact_in_every_engine(engine: Engine, kind: str, guard: str) -> None:
    net, images = layer_and_images(kind)
    converted = quantized(net, settings("per_channel", overflow=guard), engine, images)
    # One step is onednn's rounding in depthwise kernels.
    allowed = 1 if engine is Engine.onednn and "depthwise" in kind else 0
    assert steps_from_exact(net, converted, images, engine).max() <= allowed


def test_probe_finds_qnnpack_exact_and_is_repeatable() -> None:
    signature = probe()
    assert not signature.saturating_kinds(Engine.qnnpack)
    assert not signature.saturating_kinds(Engine.qnnpack, Scheme.asymmetric)
    assert probe.__wrapped__() == signature
    assert len(signature.id) == 12
    assert int(signature.id, 16) >= 0


def test_probe_leaves_the_engine_alone() -> None:
    before = torch.backends.quantized.engine
    probe.__wrapped__()
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("engine", [e for e in ENGINES if e is not Engine.qnnpack])
def test_probe_says_what_the_unguarded_sum_of_ones_does(engine: Engine) -> None:
    conv = nn.Conv2d(64, 16, 3, bias=False)
    nn.init.ones_(conv.weight)
    images = torch.ones(1, 64, 8, 8)
    output = run(quantized(nn.Sequential(conv), settings("per_channel"), engine, images), engine, images)
    assert ("conv" in probe().saturating_kinds(engine)) == (float(output.max()) < 500)


def test_what_was_tried_stands_for_the_kinds_of_layer_that_use_the_kernel() -> None:
    def kinds(*saturating: str, target: Target = Target.native, engine: Engine = Engine.x86) -> frozenset[str]:
        probes = tuple(Probe(Engine.x86, Scheme.symmetric, kind, 112) for kind in saturating)
        return overflowing_kinds(settings(), engine, FlowName.eager, target, KernelSignature("", probes))

    assert kinds() == frozenset()
    assert kinds("depthwise_wide") == kinds("depthwise_5x5", "depthwise") == {"depthwise"}
    assert kinds("stem") == kinds("conv") == {"conv", "conv_transpose"}
    assert kinds("linear", "grouped", "pointwise") == {"linear", "grouped", "pointwise"}
    assert kinds("conv", target=Target.vnni) == kinds(target=Target.avx2, engine=Engine.qnnpack) == frozenset()
    assert kinds(target=Target.avx2) == KINDS


@pytest.mark.parametrize(
    ("qconfig", "engine", "target", "signature", "expected"),
    [
        (settings(overflow="auto"), Engine.x86, Target.native, SATURATED, "layers"),
        (settings(activation_scheme="symmetric", overflow="auto"), Engine.x86, Target.native, SATURATED, "layers"),
        (settings(overflow="auto"), Engine.x86, Target.native, EXACT, "none"),
        (settings(overflow="auto"), Engine.qnnpack, Target.avx2, EXACT, "none"),
        (settings(overflow="auto"), Engine.onednn, Target.avx2, EXACT, "layers"),
        (settings(overflow="auto"), Engine.fbgemm, Target.avx2, EXACT, "layers"),
        (settings(overflow="auto"), Engine.x86, Target.vnni, SATURATED, "none"),
        (settings(overflow="auto", weight_bits=7), Engine.x86, Target.native, SATURATED, "none"),
        (settings(overflow="auto", activation_bits=6), Engine.x86, Target.avx2, SATURATED, "none"),
        (settings(overflow="none"), Engine.x86, Target.avx2, SATURATED, "none"),
        (settings(overflow="weights"), Engine.x86, Target.vnni, EXACT, "weights"),
    ],
)
def test_auto_guards_only_what_can_saturate_and_explicit_values_are_kept(
    qconfig: QConfig, engine: Engine, target: Target, signature: KernelSignature, expected: str
) -> None:
    assert resolve_overflow(qconfig, engine, FlowName.eager, target, signature) is Overflow(expected)


def test_dynamic_flow_needs_no_guard_since_torch_gives_its_activations_7_bits() -> None:
    assert (
        resolve_overflow(settings(overflow="auto"), Engine.x86, FlowName.dynamic, Target.avx2, SATURATED)
        is Overflow.none
    )
    linear = nn.Linear(64, 16, bias=False)
    nn.init.ones_(linear.weight)
    images = torch.ones(1, 64)
    for engine in ENGINES:
        prepared = FLOWS[FlowName.dynamic].prepare(nn.Sequential(linear), spec(engine=engine), images)
        output = run(FLOWS[FlowName.dynamic].convert(prepared).module, engine, images)
        assert np.allclose(output, 64, rtol=0.01), engine


@pytest.mark.parametrize("channels", [8, 24, 40])
def test_strided_pointwise_convolutions_answer_the_same_on_every_call(channels: int) -> None:
    # oneDNN alone gets up to three quarters of these calls wrong with two threads.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 32, 1, stride=2)).eval()
    images = torch.randn(8, channels, 16, 16)
    qconfig = settings(overflow="weights")
    exact = run(quantized(net, qconfig, Engine.qnnpack, images), Engine.qnnpack, images)
    converted = quantized(net, qconfig, Engine.onednn, images)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        answers = [run(converted, Engine.onednn, images) for _ in range(40)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert ((answers[0] - exact) / converted.module[0].conv.scale).abs().max() <= 1.01
