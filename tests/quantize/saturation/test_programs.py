"""16-bit sums in Q/DQ programs against loops over pairs, and the guard `overflow=layers` of the flow pt2e."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")

from qexp import quantize
from qexp.config.schema import Engine, FlowName, Overflow, Placement, QConfig, RuntimeName, Target
from qexp.quantize import FLOWS, QuantizedModel, ReducedRange
from qexp.quantize.calibration.grid import Side
from qexp.quantize.saturation import kernels, programs
from qexp.quantize.saturation.accumulators import run_length
from qexp.quantize.saturation.kernels import KINDS, Kernels, probe, resolve_overflow
from qexp.quantize.saturation.programs import SaturatingProgram
from qexp.runtimes import RUNTIMES, int8_kernels
from qexp.runtimes.onnx_file import OnnxRuntime
from tests.helpers import networks
from tests.helpers.quantizable import Plain, images, settings, spec, trained

FLOW = FLOWS[FlowName.pt2e]
EXAMPLE = images(8)
ELSEWHERE = Kernels("another", Engine.fbgemm, KINDS, frozenset())
LAYERS = {
    "conv": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False),
    "pointwise": nn.Conv2d(6, 8, 1),
    "grouped": nn.Conv2d(6, 12, 3, padding=2, groups=3),
    "depthwise": nn.Conv2d(6, 6, 3, padding="same", groups=6),
    "linear": nn.Linear(7, 5),
    "long linear": nn.Linear(300, 4),
}


def quantized(net: nn.Module, qconfig: QConfig, batch: Tensor = EXAMPLE) -> QuantizedModel:
    prepared = FLOW.prepare(FLOW.fuse(net, spec(), batch), spec(qconfig), batch)
    quantize.calibrate(prepared, [batch])
    return FLOW.convert(prepared)


def same_sign(layer: nn.Module) -> nn.Module:
    """The layer with large weights, mostly of one sign, whose sums of pairs overflow."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = cast(Tensor, layer.weight)
        weight.copy_(torch.rand(weight.shape, generator=generator) * 0.5 + 0.5)
        weight.flatten()[::7] *= -1
    return layer.eval().requires_grad_(False)


def clamped(activations: np.ndarray, weights: np.ndarray, run: int) -> int:
    """A reduction in its order, by pairs of neighbours within runs, each of which is clamped to int16."""
    total = 0
    for start in range(0, len(weights), run):
        products = activations[start : start + run] * weights[start : start + run]
        total += sum(
            int(np.clip(products[at : at + 2].sum(), -(2**15), 2**15 - 1)) for at in range(0, len(products), 2)
        )
    return total


def by_loops(layer: nn.Module, codes: np.ndarray, weights: np.ndarray, zero_point: int, run: int) -> np.ndarray:
    """What 16-bit sums change in each output of a layer, as integers."""
    if isinstance(layer, nn.Linear):
        return np.array([[clamped(row, of, run) - row @ of for of in weights] for row in codes])
    assert isinstance(layer, nn.Conv2d)
    (kh, kw), (sy, sx), (dy, dx) = layer.kernel_size, layer.stride, layer.dilation
    py, px = (kh // 2, kw // 2) if layer.padding == "same" else cast(tuple[int, int], layer.padding)
    padded = np.pad(codes, ((0, 0), (0, 0), (py, py), (px, px)), constant_values=zero_point)
    rows, columns = (
        (padded.shape[2 + i] - d * (k - 1) - 1) // s + 1 for i, d, k, s in ((0, dy, kh, sy), (1, dx, kw, sx))
    )
    found = np.zeros((len(codes), len(weights), rows, columns), int)
    of_group = weights.shape[1]
    for n, out, y, x in np.ndindex(*found.shape):
        first = out // (len(weights) // layer.groups) * of_group
        taken = padded[n, first : first + of_group, y * sy : y * sy + dy * kh : dy, x * sx : x * sx + dx * kw : dx]
        activations, factors = (one[:, :kh, :kw].transpose(1, 2, 0).ravel() for one in (taken, weights[out]))
        found[n, out, y, x] = clamped(activations, factors, run) - activations @ factors
    return found


@pytest.mark.parametrize("order", [Engine.fbgemm, Engine.onednn])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_what_16_bit_sums_lose_is_that_of_loops_over_pairs(kind: str, order: Engine) -> None:
    layer = same_sign(LAYERS[kind])
    shape = (3, layer.in_features) if isinstance(layer, nn.Linear) else (2, 6, 5, 6)
    batch = torch.rand(shape, generator=torch.Generator().manual_seed(3)) ** 0.2 - 0.1
    int8 = quantized(layer, replace(settings(), placement=Placement.layers), batch)
    one = next(iter(int8.qparams[name] for name in int8.qparams if not name.endswith("weight")))
    scale, zero_point = float(one.scale[0]), int(one.zero_point[0])
    codes = np.clip(np.rint(batch.numpy() / scale) + zero_point, 0, 255).astype(int)
    (weights,) = (value.numpy().astype(int) for name, value in int8.module.named_buffers() if name.endswith("codes"))
    of_weights = next(int8.qparams[name] for name in int8.qparams if name.endswith("weight")).scale
    run = run_length(order, weights.shape, getattr(layer, "groups", 1))
    steps = of_weights.reshape(1, -1, *[1] * (batch.dim() - 2)) * scale
    expected = by_loops(layer, codes, weights, zero_point, run) * steps
    saturating = SaturatingProgram(cast(fx.GraphModule, int8.module), order, KINDS)
    with torch.inference_mode():
        lost = (saturating(batch) - int8.module(batch)).numpy()
    (found,) = saturating.found.values()
    assert found.outputs == lost.size
    if run > 1:
        assert found.saturates
        assert found.highest == codes.max()
        assert np.abs(expected).max() > 5 * np.abs(steps).max()
    assert np.abs(lost - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    exact = SaturatingProgram(cast(fx.GraphModule, int8.module), order, KINDS, saturating=False)
    with torch.inference_mode():
        assert torch.equal(exact(batch), int8.module(batch))
    assert exact.found == saturating.found


def test_only_kinds_that_saturate_are_at_risk_and_7_bits_never_are() -> None:
    def at_risk(qconfig: QConfig, *kinds: str) -> bool:
        return programs.at_risk(cast(fx.GraphModule, quantized(network(), qconfig).module), Engine.fbgemm, kinds)

    assert at_risk(settings(), "conv")
    assert not at_risk(settings(), "grouped")
    assert not at_risk(settings(overflow="weights"), *KINDS)
    assert not at_risk(settings(activation_bits=7), *KINDS)


def network() -> nn.Module:
    """Its first layer's weights are all alike, so that pairs add up to 254."""
    net = trained(Plain())
    with torch.no_grad():
        cast(Tensor, net.get_parameter("conv1.weight")).fill_(0.05)
    return net


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("placement", [Placement.every_op, Placement.layers])
def test_only_layers_that_saturate_are_narrowed(placement: Placement, observer: str) -> None:
    qconfig = replace(settings(overflow="layers", weight_observer=observer), placement=placement)
    unguarded = quantized(network(), qconfig)
    guarded, found = quantize.reduce_range(unguarded, Target.native, EXAMPLE, [ELSEWHERE])
    sides = {one.name: one.side for one in found}
    assert "conv1" in sides
    weights = quantized(network(), replace(qconfig, overflow=Overflow.weights)).qparams
    for name, after in guarded.qparams.items():
        if name.endswith(".weight"):
            narrowed = sides.get(name.removesuffix(".weight")) is Side.weights
            assert np.array_equal(after.scale, (weights if narrowed else unguarded.qparams)[name].scale), name

    def saturating(model: QuantizedModel) -> list[str]:
        emulated = SaturatingProgram(cast(fx.GraphModule, model.module), Engine.fbgemm, KINDS, saturating=False)
        with torch.inference_mode():
            emulated(EXAMPLE)
        return [one.name for one in emulated.found.values() if one.saturates]

    assert saturating(unguarded) == list(sides)
    assert saturating(guarded) == []
    quantize.check_layers(guarded, EXAMPLE[:2])
    assert quantize.reduce_range(unguarded, Target.native, EXAMPLE) == (unguarded, ())


def test_the_side_that_costs_less_is_narrowed() -> None:
    def of_first_layer(net: nn.Module, batch: Tensor) -> ReducedRange:
        int8 = quantized(net, settings(overflow="layers"), batch)
        _, found = quantize.reduce_range(int8, Target.native, batch, [ELSEWHERE])
        for one in found:  # no tensor here is read by two layers
            assert (one.side is Side.weights) == (one.noise_weights <= one.noise_activations), one
        return next(one for one in found if one.name == "conv1")

    alike = of_first_layer(network(), EXAMPLE)
    assert alike.side is Side.weights, "7 bits say weights that are all alike as well as 8 do"
    various = network()
    with torch.no_grad():
        cast(Tensor, various.get_parameter("conv1.weight")).uniform_(0.02, 0.05, generator=torch.Generator())
    black_and_white = of_first_layer(various, (EXAMPLE > 0).float())
    assert black_and_white.side is Side.activations


def test_auto_guards_layers_where_a_runtime_of_the_program_saturates() -> None:
    def resolved(*others: Kernels) -> Overflow:
        auto = settings(overflow="auto")
        return resolve_overflow(auto, Engine.x86, FlowName.pt2e, Target.avx2, probe(), others)

    assert resolved() is Overflow.none  # torch's kernels don't execute it
    assert resolved(replace(ELSEWHERE, there=KINDS)) is Overflow.layers


@pytest.mark.slow
@pytest.mark.skipif(not probe().dense_saturates(Engine.fbgemm), reason="this CPU's sums are exact")
@pytest.mark.parametrize("name", [RuntimeName.onnxruntime, RuntimeName.openvino])
def test_a_cpu_that_saturates_computes_what_is_emulated(name: RuntimeName, tmp_path: Path) -> None:
    runtime = RUNTIMES[name]
    assert isinstance(runtime, OnnxRuntime)
    assert kernels.saturating(int8_kernels.probe(name)) == runtime.saturates_on_avx2 - {"conv_transpose"}
    net, batch = networks.built("SqueezeExciteNet"), networks.images(16)
    int8 = quantized(net, settings(), networks.images(32, seed=1))
    path = runtime.export(int8.module, batch, tmp_path / "int8.onnx")
    executed = runtime.load(path, lambda: net, None)(batch)
    emulated = SaturatingProgram(int8.module, runtime.sums_as, runtime.saturates_on_avx2)
    with torch.inference_mode():
        to_exact, to_emulated = ((executed - one(batch)).square().mean().sqrt() for one in (int8.module, emulated))
    assert to_emulated < 0.1 * to_exact
