"""Grids and observers: torch's defaults bit for bit where the grid is full, and nothing but qmin and qmax where not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.ao.quantization import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

from qexp.config.schema import ActivationObserver, Granularity, Observer
from qexp.quantize.calibration.grid import Grid, Side, executed_bits, grid
from qexp.quantize.calibration.observers import to_qparams
from qexp.quantize.torch_backend.observers import activation_observer, weight_observer
from tests.helpers.quantizable import MINMAX, settings

DATA = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 0.7


@pytest.mark.parametrize(("bits", "qmin", "qmax"), [(8, -128, 127), (7, -64, 63), (4, -8, 7), (2, -2, 1)])
def test_weights_live_on_signed_integers(bits: int, qmin: int, qmax: int) -> None:
    assert grid(settings(weight_bits=bits), Side.weights) == Grid(qmin, qmax)


@pytest.mark.parametrize(("bits", "qmax"), [(8, 255), (7, 127), (4, 15), (2, 3)])
def test_activations_live_on_unsigned_integers(bits: int, qmax: int) -> None:
    assert grid(settings(activation_bits=bits), Side.activations) == Grid(0, qmax)


@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_a_guard_narrows_its_own_side_to_7_bits_and_never_widens(bits: int) -> None:
    qconfig = settings(weight_bits=bits, activation_bits=bits, overflow="weights")
    assert executed_bits(qconfig, Side.weights) == min(bits, 7)
    assert executed_bits(qconfig, Side.activations) == bits
    qconfig = settings(weight_bits=bits, activation_bits=bits, overflow="activations")
    assert executed_bits(qconfig, Side.weights) == bits
    assert executed_bits(qconfig, Side.activations) == min(bits, 7)


def test_an_unresolved_guard_makes_no_grid() -> None:
    with pytest.raises(ValueError, match="auto"):
        grid(settings(overflow="auto"), Side.weights)


@pytest.mark.parametrize(("guard", "side"), [("weights", Side.weights), ("activations", Side.activations)])
def test_two_products_on_a_guarded_grid_fit_into_16_bits(guard: str, side: Side) -> None:
    weights, activations = (grid(settings(overflow=guard), s) for s in (Side.weights, Side.activations))
    assert 2 * activations.qmax * max(-weights.qmin, weights.qmax) <= 2**15 - 1
    full = settings(overflow="none")
    assert 2 * grid(full, Side.activations).qmax * -grid(full, Side.weights).qmin > 2**15 - 1
    assert not grid(settings(overflow=guard), side).full


def test_symmetric_activations_have_torchs_zero_point_of_128() -> None:
    # Told 0...255 explicitly, torch takes 127.
    for observer in (MINMAX, Observer(ActivationObserver.histogram, bins=2048)):
        ours = activation_observer(settings(activation_scheme="symmetric"), observer)()
        ours(DATA)
        assert to_qparams(ours).zero_point.tolist() == [128]


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (MINMAX, MinMaxObserver),
        (Observer(ActivationObserver.moving_average, averaging_constant=0.01), MovingAverageMinMaxObserver),
        (Observer(ActivationObserver.histogram), HistogramObserver),
    ],
)
def test_a_full_grid_has_the_parameters_of_torchs_default(ours: Observer, torchs: type, scheme: str) -> None:
    qscheme = torch.per_tensor_symmetric if scheme == "symmetric" else torch.per_tensor_affine
    first, second = activation_observer(settings(activation_scheme=scheme), ours)(), torchs(qscheme=qscheme)
    for part in DATA.split(2):
        first(part)
        second(part)
    scale, zero_point = second.calculate_qparams()
    qparams = to_qparams(first)
    assert np.array_equal(qparams.scale, scale.numpy())
    assert np.array_equal(qparams.zero_point, zero_point.numpy())
    assert (qparams.qmin, qparams.qmax, qparams.axis) == (0, 255, None)


def test_half_the_grid_has_the_parameters_of_reduce_range() -> None:
    with pytest.warns(UserWarning, match="reduce_range will be deprecated"):
        reduced = MinMaxObserver(reduce_range=True)
    ours = activation_observer(settings(overflow="activations"), MINMAX)()
    ours(DATA)
    reduced(DATA)
    scale, zero_point = reduced.calculate_qparams()
    assert np.array_equal(to_qparams(ours).scale, scale.numpy())
    assert np.array_equal(to_qparams(ours).zero_point, zero_point.numpy())


def test_weights_per_channel_have_a_scale_for_each_output_channel() -> None:
    observer = weight_observer(settings(), Granularity.per_channel)()
    observer(DATA)
    qparams = to_qparams(observer, axis=0)
    expected = DATA.abs().amax(dim=(1, 2, 3)) / 127.5
    assert np.allclose(qparams.scale, expected.numpy(), rtol=1e-6)
    assert qparams.scale.dtype == np.float32
    assert qparams.zero_point.tolist() == [0, 0, 0, 0]


def test_bins_reach_torchs_histogram() -> None:
    histogram = activation_observer(settings(), Observer(ActivationObserver.histogram, bins=77))()
    assert histogram.bins == 77
