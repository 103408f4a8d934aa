"""More than 8 bits, against a computation with numpy alone, and by the law that a bit is worth 6 dB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import ActivationObserver, FlowName, Observer, QConfig, RuntimeName
from qexp.quantize import FLOWS, QuantizedModel
from qexp.runtimes import RUNTIMES
from tests.helpers.quantizable import MINMAX, RECORDED, Chain, Plain, Squeezed, images, settings, spec, trained

CALIBRATION, BATCH = images(32, seed=3), images(16, seed=4)


def simulated(net: nn.Module, flow: FlowName, qconfig: QConfig, observer: Observer = MINMAX) -> QuantizedModel:
    if flow.missing:
        pytest.skip(f"{flow.missing} is not installed")
    how = spec(qconfig, observer)
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, how, CALIBRATION[:2]), how, CALIBRATION[:2])
    quantize.calibrate(prepared, CALIBRATION.split(8))
    return quantize.simulated(FLOWS[flow].convert(prepared), CALIBRATION[:2])


def sqnr(model: QuantizedModel, batch: Tensor = BATCH) -> float:
    """Of its logits, in dB."""
    with torch.inference_mode():
        expected, found = model.fused(batch).double(), model.module(batch).double()
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Linear(6 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).flatten(1))


class ByNumpy:
    """`Small` in float64: what is quantized is clipped and rounded by the definition of its grid."""

    def __init__(self, net: Small, weight_bits: int, activation_bits: int) -> None:
        self.weight_bits, self.levels = weight_bits, 2**activation_bits - 1
        self.state = {name: value.double().numpy() for name, value in net.state_dict().items()}
        self.ranges: dict[str, tuple[float, float]] = {}

    def weight(self, name: str) -> np.ndarray:
        values = self.state[f"{name}.weight"]
        largest, most = np.abs(values).reshape(len(values), -1).max(1), 2 ** (self.weight_bits - 1)
        scale = (largest / (most - 0.5)).reshape(-1, *[1] * (values.ndim - 1))
        return np.clip(np.rint(values / scale), -most, most - 1) * scale

    def activation(self, name: str, values: np.ndarray) -> np.ndarray:
        if name not in self.ranges:  # the first call calibrates
            self.ranges[name] = min(values.min(), 0), max(values.max(), 0)
            return values
        low, high = self.ranges[name]
        scale = (high - low) / self.levels
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(values / scale) + zero, 0, self.levels) - zero) * scale

    def __call__(self, batch: Tensor, quantized: bool = True) -> np.ndarray:
        weights = {name: self.weight(name) if quantized else self.state[f"{name}.weight"] for name in ("conv", "fc")}
        x = self.activation("images", batch.double().numpy())
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), (2, 3))
        x = np.einsum("nchwij,ocij->nohw", windows, weights["conv"]) + self.state["conv.bias"].reshape(-1, 1, 1)
        x = self.activation("conv", np.maximum(x, 0)).reshape(len(x), -1)
        return self.activation("logits", x @ weights["fc"].T + self.state["fc.bias"])


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx, FlowName.pt2e])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(16, 16), (12, 12), (8, 16), (10, 8)])
def test_it_is_the_model_of_an_independent_computation(flow: FlowName, weight_bits: int, activation_bits: int) -> None:
    net = trained(Small())
    for layer in (net.conv, net.fc):
        # The largest of a channel is positive: a negative one would lie on the border of two codes.
        rows = layer.weight.flatten(1)
        rows *= rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    expected = ByNumpy(net, weight_bits, activation_bits)  # type: ignore[arg-type]
    expected(CALIBRATION, quantized=False)
    model = simulated(net, flow, settings(weight_bits=weight_bits, activation_bits=activation_bits))
    with torch.inference_mode():
        found = model.module(BATCH).numpy()
    low, high = expected.ranges["logits"]
    steps = np.abs(found - expected(BATCH)) * expected.levels / (high - low)
    assert steps.max() < 1.1  # a sum that lies on the border of two codes
    assert np.mean(steps < 0.01) > 0.8
    assert model.qparams["conv.weight"].qmax == 2 ** (weight_bits - 1) - 1
    assert {found.qmax for name, found in model.qparams.items() if ".weight" not in name} == {2**activation_bits - 1}
    assert {layer.kernel for layer in model.layers} == {"simulated"}


@pytest.mark.parametrize(
    ("net", "flow"), [(Chain, FlowName.eager), (Squeezed, FlowName.fx), (Plain, FlowName.fx), (Squeezed, FlowName.pt2e)]
)
def test_a_bit_more_is_worth_six_decibels(net: type[nn.Module], flow: FlowName) -> None:
    """20 log10(2) = 6.02 dB of signal over noise for half a step; on images of the calibration, where nothing is
    clipped."""
    bits = [9, 12, 16]
    found = [
        sqnr(simulated(trained(net()), flow, settings(weight_bits=b, activation_bits=b)), CALIBRATION) for b in bits
    ]
    slopes = np.diff(found) / np.diff(bits)
    assert ((slopes > 5) & (slopes < 7)).all(), (found, slopes)
    assert found[-1] > 65


@pytest.mark.parametrize("observer", ["mse", "percentile", "histogram"])
def test_every_observer_finds_a_range_for_the_finer_grid(observer: str) -> None:
    how = RECORDED.get(observer) or Observer(ActivationObserver.histogram, bins=2048)
    if observer == "percentile":
        how = Observer(ActivationObserver.percentile, percentile=100)
    model = simulated(trained(Chain()), FlowName.eager, settings(weight_bits=16, activation_bits=16), how)
    assert sqnr(model) > 45


@pytest.mark.parametrize("flow", [FlowName.fx, FlowName.pt2e])
def test_a_range_that_reaches_beyond_a_clamp_is_refined_too(flow: FlowName) -> None:
    qconfig = settings(weight_bits=16, activation_bits=16, range_after_clamp=False)
    assert sqnr(simulated(trained(Chain(nn.ReLU6)), flow, qconfig), CALIBRATION) > 60


def test_asymmetric_weights_and_symmetric_activations_of_one_scale_too() -> None:
    qconfig = settings("per_tensor", "asymmetric", "symmetric", weight_bits=16, activation_bits=16)
    assert sqnr(simulated(trained(Chain()), FlowName.eager, qconfig), CALIBRATION) > 65


def test_what_is_saved_answers_as_the_model_for_any_number_of_images(tmp_path: Path) -> None:
    model = simulated(trained(Squeezed()), FlowName.fx, settings(weight_bits=12, activation_bits=16))
    runtime = RUNTIMES[RuntimeName.simulated]
    loaded = runtime.load(runtime.export(model.module, BATCH[:1], tmp_path / "int8.pt2"), nn.Identity, None)
    for count in (1, 33):
        batch = images(count, seed=count)
        with torch.inference_mode():
            assert torch.equal(loaded(batch), model.module(batch))
