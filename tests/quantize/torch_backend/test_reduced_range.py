"""overflow=layers: 7 bits where accumulators saturate and nowhere else, on the side that costs less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from qexp import quantize
from qexp.config.schema import ActivationObserver, Engine, FlowName, Observer, Overflow, QConfig, Target
from qexp.quantize import FLOWS, Prepared
from qexp.quantize.calibration.grid import Side
from qexp.quantize.saturation import narrowing
from qexp.quantize.saturation.kernels import KINDS, Kernels
from qexp.quantize.torch_backend import emulation, reduced_range
from qexp.quantize.torch_backend import layers as torch_layers
from tests.helpers.quantizable import MINMAX, Chain, Plain, images, settings, spec, trained

EXAMPLE = images(8)
OBSERVERS = {
    "minmax": MINMAX,
    "moving_average": Observer(ActivationObserver.moving_average, averaging_constant=0.1),
    "histogram": Observer(ActivationObserver.histogram, bins=256),
    "percentile": Observer(ActivationObserver.percentile, percentile=99.0),
    "mse": Observer(ActivationObserver.mse),
}


def calibrated(
    net: nn.Module, flow: FlowName, qconfig: QConfig, observer: Observer = MINMAX, fusion: bool = True
) -> Prepared:
    fused = FLOWS[flow].fuse(net, spec(fusion=fusion), EXAMPLE)
    prepared = FLOWS[flow].prepare(fused, spec(qconfig, observer), EXAMPLE)
    quantize.calibrate(prepared, [EXAMPLE])
    return prepared


def saturating(net: nn.Module, *names: str) -> nn.Module:
    """The network with layers whose weights are all alike in each output channel, so that pairs add up to 254."""
    trained(net)
    for name in names:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        with torch.no_grad():
            layer.weight.copy_(torch.full_like(layer.weight, 0.05))
    return net


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_narrowed_tensors_are_those_of_an_observer_made_with_that_grid(
    flow: FlowName, observer: str, scheme: str
) -> None:
    layers = settings(activation_scheme=scheme, overflow="layers")
    prepared = calibrated(trained(Chain()), flow, layers, OBSERVERS[observer])
    expected = torch_layers.read_qparams(
        calibrated(trained(Chain()), flow, replace(layers, overflow=Overflow.activations), OBSERVERS[observer]).module
    )
    for module in list(prepared.module.modules()):
        if isinstance(module, UniformQuantizationObserverBase):
            narrowing.reduce_activations(module, layers)
    actual = torch_layers.read_qparams(prepared.module)
    for name in (name for name in expected if not name.endswith(".weight")):
        assert actual[name].scale == expected[name].scale
        assert actual[name].zero_point == expected[name].zero_point
        # A guard's grid is one of the scale: what is executed goes on beyond it.
        assert (actual[name].qmin, actual[name].qmax) == (expected[name].qmin, expected[name].qmax) == (0, 255)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_only_layers_that_saturate_are_narrowed(flow: FlowName) -> None:
    qconfig = settings(overflow="layers")
    prepared = calibrated(saturating(Chain(), "features.0"), flow, qconfig)
    unguarded = FLOWS[flow].convert(prepared)
    guarded, found = quantize.reduce_range(unguarded, Target.avx2, EXAMPLE)
    names = [one.name for one in found]
    assert "features.0" in names
    plain = torch_layers.read_qparams(prepared.module)
    for name, after in guarded.qparams.items():
        sides = {one.name: one.side for one in found}
        if name.endswith(".weight"):
            assert (after.qmax < plain[name].qmax) == (sides.get(name.removesuffix(".weight")) is Side.weights)
    exact = quantize.exact(guarded.prepared)
    emulated = emulation.with_emulated_accumulators(guarded.module, Engine.x86)
    rows = emulation.layer_by_layer(emulated, exact, [EXAMPLE], Engine.x86)
    assert not any(row.saturates for row in rows)
    # And without the guard it does.
    emulated = emulation.with_emulated_accumulators(unguarded.module, Engine.x86)
    before = emulation.layer_by_layer(emulated, quantize.exact(prepared), [EXAMPLE], Engine.x86)
    assert [row.name for row in before if row.saturates] == names


@pytest.mark.parametrize("engine", [Engine.fbgemm, Engine.qnnpack])
def test_layers_that_saturate_in_another_library_are_narrowed_too(engine: Engine) -> None:
    prepared = calibrated(saturating(Chain(), "features.0"), FlowName.fx, settings(overflow="layers"))
    prepared = replace(prepared, spec=replace(prepared.spec, engine=engine))
    model = FLOWS[FlowName.fx].convert(prepared)

    def narrowed(*kinds: str) -> list[str]:
        other = Kernels("another", Engine.fbgemm, frozenset(kinds), frozenset())
        return [one.name for one in quantize.reduce_range(model, Target.vnni, EXAMPLE, [other])[1]]

    own = [one.name for one in quantize.reduce_range(model, Target.vnni, EXAMPLE)[1]]  # on a CPU without VNNI
    fbgemm = FLOWS[FlowName.fx].convert(replace(prepared, spec=replace(prepared.spec, engine=Engine.fbgemm)))
    assert narrowed(*KINDS) == [one.name for one in quantize.reduce_range(fbgemm, Target.avx2, EXAMPLE)[1]] != []
    assert set(narrowed("depthwise")) == {*own, "features.3"}
    assert narrowed("grouped") == narrowed() == own, "this network has none"


def test_nothing_is_narrowed_where_nothing_saturates() -> None:
    qconfig = settings(overflow="layers", weight_bits=7)
    prepared = calibrated(trained(Chain()), FlowName.fx, qconfig)
    model = FLOWS[FlowName.fx].convert(prepared)
    same, found = quantize.reduce_range(model, Target.avx2, EXAMPLE)
    assert found == ()
    assert same is model
    other = FLOWS[FlowName.fx].convert(replace(prepared, spec=replace(prepared.spec, engine=Engine.qnnpack)))
    assert quantize.reduce_range(other, Target.avx2, EXAMPLE)[1] == ()


def rounded(values: np.ndarray, scale: np.float32, zero_point: int, low: int, high: int) -> np.ndarray:
    """On a grid, in float32 as torch does it: the largest of symmetric weights lies half way between two steps."""
    steps = np.clip(np.rint(values * (np.float32(1) / scale)) + zero_point, low, high) - zero_point
    return steps.astype(float) * float(scale)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_the_noise_of_either_side_is_that_of_numpy_and_the_smaller_one_decides(flow: FlowName, seed: int) -> None:
    qconfig = settings("per_tensor", overflow="layers")
    net = trained(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)), seed)
    prepared = calibrated(net, flow, qconfig)
    _, (found,) = reduced_range.reduce_range_of_layers(prepared.module, ["1"], qconfig, EXAMPLE)

    x = EXAMPLE.flatten(1).numpy()
    weight = net[1].weight.detach().numpy()  # type: ignore[union-attr, operator]
    clean = x.astype(float) @ weight.astype(float).T

    def noise(x_steps: int, w_half: float) -> float:
        x_scale = (x.max() - x.min()) / np.float32(x_steps)
        on_grid = rounded(x, x_scale, round(float(-x.min() / x_scale)), 0, x_steps)
        ends = round(-w_half - 0.5), round(w_half - 0.5)
        weights = rounded(weight, np.abs(weight).max() / np.float32(w_half), 0, *ends)
        return float(((on_grid @ weights.T - clean) ** 2).sum() / (clean**2).sum())

    assert found.noise_weights == pytest.approx(noise(255, 63.5), rel=1e-3)
    assert found.noise_activations == pytest.approx(noise(127, 127.5), rel=1e-3)
    cheaper = Side.weights if found.noise_weights < found.noise_activations else Side.activations
    assert found.side is cheaper


class Fork(nn.Module):
    """One tensor, read by two layers behind a pooling and a ReLU that keep its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        return self.fc(torch.cat([self.left(x).mean((2, 3)), self.right(x).mean((2, 3))], 1))


def test_a_tensor_is_narrowed_for_all_its_readers_or_for_none() -> None:
    qconfig = settings("per_tensor", overflow="layers")
    prepared = calibrated(trained(Fork()), FlowName.fx, qconfig)
    readers = {r.name: r for r in reduced_range._readers(prepared.module, ["left", "right"], qconfig, EXAMPLE)}
    assert readers["left"].observer is readers["right"].observer is not None
    narrowed, (left, right) = reduced_range.reduce_range_of_layers(prepared.module, ["left", "right"], qconfig, EXAMPLE)
    by_weights = left.noise_weights + right.noise_weights
    by_activations = left.noise_activations + right.noise_activations
    assert left.side is right.side is (Side.activations if by_activations < by_weights else Side.weights)
    # With one reader at risk, the other one's noise still counts against reducing the range of the tensor.
    _, (alone,) = reduced_range.reduce_range_of_layers(prepared.module, ["left"], qconfig, EXAMPLE)
    kept = readers["right"].noise[None]
    assert alone.side is (Side.activations if by_activations < left.noise_weights + kept else Side.weights)
    assert torch_layers.read_qparams(narrowed).keys() == torch_layers.read_qparams(prepared.module).keys()


def test_the_statistics_stay_those_of_calibration() -> None:
    qconfig = settings(overflow="layers")
    prepared = calibrated(trained(Plain()), FlowName.fx, qconfig)
    before = torch_layers.read_qparams(prepared.module)
    reduced_range.reduce_range_of_layers(prepared.module, ["conv1"], qconfig, EXAMPLE * 100)
    after = torch_layers.read_qparams(prepared.module)
    assert all(before[name].scale.tolist() == after[name].scale.tolist() for name in before)
