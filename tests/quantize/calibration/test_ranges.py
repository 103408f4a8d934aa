"""Every solver against brute force on the raw values, at its limits, and by its symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy as kullback_leibler
from torch import Tensor
from torch.ao.quantization import MinMaxObserver

from qexp.config.schema import ActivationObserver, FlowName, Granularity, Observer, Scheme
from qexp.quantize import FLOWS
from qexp.quantize.calibration.grid import Grid, Side, grid
from qexp.quantize.calibration.passes import calibrate
from qexp.quantize.calibration.ranges import (
    range_entropy,
    range_minmax,
    range_moving_average,
    range_mse,
    range_mse_rows,
    range_percentile,
    solver,
)
from qexp.quantize.calibration.statistics_collector import statistics
from qexp.quantize.calibration.tensor_statistics import merge
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.quantize.torch_backend.observers import activation_observer, weight_observer
from tests.helpers.quantizable import MINMAX, RECORDED, Chain, images, settings, spec, trained

SYMMETRIC, ASYMMETRIC = Scheme.symmetric, Scheme.asymmetric
EIGHT = Grid(0, 255)
QSCHEMES = {SYMMETRIC: torch.per_tensor_symmetric, ASYMMETRIC: torch.per_tensor_affine}


def values(kind: str, count: int = 20_000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    exponential = -torch.rand(count, generator=generator).clamp(min=1e-6).log()
    outlier = normal.clone()
    outlier[0] = 100
    return {
        "normal": normal,
        "after a ReLU": normal.relu(),
        "after a ReLU6": (4 * normal).clamp(0, 6),
        "negative": -normal.abs(),
        "long tail": exponential**2,
        "two tails": exponential * normal.sign(),
        "skewed": exponential - 0.4,
        "outlier": outlier,
        "uniform": torch.rand(count, generator=generator) - 0.3,
    }[kind]


KINDS = [
    "normal", "after a ReLU", "after a ReLU6", "negative", "long tail", "two tails", "skewed", "outlier", "uniform",
]  # fmt: skip


def torchs_qparams(low: float, high: float, on: Grid, scheme: Scheme, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Quantization parameters by torch's formula."""
    bounds = {} if on.full else {"quant_min": on.qmin, "quant_max": on.qmax}
    observer = MinMaxObserver(torch.qint8 if signed else torch.quint8, QSCHEMES[scheme], **bounds)
    return observer._calculate_qparams(torch.tensor(low), torch.tensor(high))


def squared_error(x: Tensor, low: float, high: float, on: Grid, scheme: Scheme, signed: bool = False) -> float:
    """Mean squared error of the raw values on the grid that torch makes of a range."""
    scale, zero_point = torchs_qparams(low, high, on, scheme, signed)
    quantized = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), on.qmin, on.qmax)
    return float((quantized.double() - x.double()).square().mean())


def least_error(x: Tensor, on: Grid, scheme: Scheme, signed: bool = False) -> float:
    """The smallest mean squared error of a dense grid of ranges: 1,000 where one end is searched for, else 60 by 60."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if scheme is SYMMETRIC:
        peak = max(-low, high)
        ranges = [(-peak * k / 1000, peak * k / 1000) for k in range(1, 1001)]
    elif low == 0 or high == 0:
        ranges = [(low * k / 1000, high * k / 1000) for k in range(1, 1001)]
    else:
        ranges = [(low * i / 60, high * j / 60) for i in range(1, 61) for j in range(1, 61)]
    return min(squared_error(x, *ends, on, scheme, signed) for ends in ranges)


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_no_range_has_an_error_that_is_much_smaller_than_that_of_mse(kind: str, bits: int, scheme: Scheme) -> None:
    x, on = values(kind), Grid(0, 2**bits - 1)
    found = squared_error(x, *range_mse(statistics(x), on, scheme), on, scheme)
    assert found <= 1.02 * least_error(x, on, scheme)
    assert found <= 1.0001 * squared_error(x, float(x.min()), float(x.max()), on, scheme)


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_of_weights_as_a_whole_is_on_their_own_grid(bits: int, scheme: Scheme) -> None:
    x = values("two tails")
    qconfig = settings("per_tensor", weight_scheme=str(scheme), weight_bits=bits, weight_observer="mse")
    observer = weight_observer(qconfig, Granularity.per_tensor)()
    observer(x)
    on = grid(qconfig, Side.weights)
    found = squared_error(x, float(observer.min_val), float(observer.max_val), on, scheme, signed=True)
    assert found <= 1.02 * least_error(x, on, scheme, signed=True)


@pytest.mark.parametrize(
    ("scheme", "bits", "tolerance"),
    [
        (SYMMETRIC, 2, 1.02), (SYMMETRIC, 4, 1.02), (SYMMETRIC, 8, 1.08),
        (ASYMMETRIC, 2, 1.2), (ASYMMETRIC, 4, 1.06), (ASYMMETRIC, 8, 1.06),
    ],
)  # fmt: skip
def test_mse_of_channels_is_that_of_each_channel(scheme: Scheme, bits: int, tolerance: float) -> None:
    kinds = ["normal", "two tails", "skewed", "negative", "uniform", "after a ReLU"]
    rows = torch.stack([4.0**-i * values(kind, 600, seed=i) for i, kind in enumerate(kinds)])
    weight = rows.reshape(len(kinds), 24, 5, 5)
    qconfig = settings(weight_scheme=str(scheme), weight_bits=bits, weight_observer="mse")
    observer = weight_observer(qconfig, Granularity.per_channel)()
    observer(weight)
    on = grid(qconfig, Side.weights)
    for row, low, high in zip(rows, observer.min_val, observer.max_val, strict=True):
        found = squared_error(row, float(low), float(high), on, scheme, signed=True)
        assert found <= tolerance * least_error(row, on, scheme, signed=True)


def test_channels_do_not_depend_on_each_other() -> None:
    rows = np.random.default_rng(0).normal(size=(600, 9)).astype(np.float32)
    rows[3] = 0
    low, high = range_mse_rows(rows, Grid(-128, 127), SYMMETRIC)
    assert (low[3], high[3]) == (0, 0)
    for start in (0, 300, 599):
        alone = range_mse_rows(rows[start : start + 1], Grid(-128, 127), SYMMETRIC)
        assert (low[start], high[start]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_those_of_the_raw_values(kind: str, percentile: float) -> None:
    x = values(kind)
    found, exact = statistics(x), x.double().numpy()
    share = percentile / 100
    # The quantile and the result are in one bin, which is 1/512 of a power of two.
    low, high = range_percentile(found, EIGHT, ASYMMETRIC, percentile)
    assert high == pytest.approx(np.quantile(exact, (1 + share) / 2, method="inverted_cdf"), rel=1 / 512, abs=1e-37)
    mirrored = -np.quantile(-exact, (1 + share) / 2, method="inverted_cdf")
    assert low == pytest.approx(mirrored, rel=1 / 512, abs=1e-37)
    low, high = range_percentile(found, EIGHT, SYMMETRIC, percentile)
    bound = np.quantile(np.abs(exact), share, method="inverted_cdf")
    assert max(-low, high) == pytest.approx(bound, rel=1 / 512, abs=1e-37)


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC])
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_values_are_minmax(kind: str, scheme: Scheme) -> None:
    found = statistics(values(kind))
    assert range_percentile(found, EIGHT, scheme, 100) == range_minmax(found, EIGHT, scheme)


def divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """The divergence by its definition, with scipy."""
    p = counts[start:stop].copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    q = np.zeros(len(p))
    for level in range(levels):
        group = slice(level * len(p) // levels, (level + 1) * len(p) // levels)
        filled = p[group] > 0
        if filled.any():
            q[group][filled] = counts[start:stop][group].sum() / filled.sum()
    if not q.any():
        return np.inf
    q[(q == 0) & (p > 0)] = 1e-4
    return float(kullback_leibler(p, q))


@pytest.mark.parametrize("bits", [3, 5, 8])
@pytest.mark.parametrize("kind", ["normal", "after a ReLU", "long tail", "two tails", "outlier"])
@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC])
def test_entropy_is_the_least_divergence_of_all_windows(kind: str, bits: int, scheme: Scheme) -> None:
    # With a peak of 1, edges of the linear histogram are edges of the fine one.
    x = values(kind)
    x = torch.where(x.abs() == x.abs().max(), x.sign(), 0.999 * x / x.abs().max())
    exact, levels = x.double().numpy(), 2**bits
    one_sided = scheme is ASYMMETRIC and exact.min() >= 0
    if one_sided:
        counts, edges = np.histogram(exact[exact != 0], 512, range=(0, 1))
        windows = [(0, i) for i in range(512, levels - 1, -1)]
    else:
        counts, edges = np.histogram(exact[exact != 0], 512, range=(-1, 1))
        windows = [(256 - i, 256 + i) for i in range(256, levels // 2 - 1, -1)]
    found = [divergence(counts, *window, levels) for window in windows]
    threshold = edges[windows[int(np.argmin(found))][1]]
    low, high = range_entropy(statistics(x), Grid(0, levels - 1), scheme, 512)
    assert max(-low, high) == pytest.approx(threshold, rel=1e-12)
    assert low >= float(x.min())


# onnxruntime 1.32.0: HistogramCollector(method, symmetric, 2048, 256, percentile, "same") of
# onnxruntime.quantization.calibrate; .collect({"x": [x]}); .compute_collection_result()["x"][:2].
ONNX_RUNTIME = {
    "normal": {
        (99, ASYMMETRIC): (-2.5924, 2.5785), (99, SYMMETRIC): (-2.5832, 2.5832),
        (99.9, ASYMMETRIC): (-3.2856, 3.2809), (99.9, SYMMETRIC): (-3.2833, 3.2833),
        (99.99, ASYMMETRIC): (-3.9233, 3.9418), (99.99, SYMMETRIC): (-3.9187, 3.9187),
        "entropy": (-4.1589, 4.1636),
    },
    "laplace": {
        (99, ASYMMETRIC): (-4.6927, 4.5609), (99, SYMMETRIC): (-4.6268, 4.6268),
        (99.9, ASYMMETRIC): (-7.0654, 6.9336), (99.9, SYMMETRIC): (-6.9666, 6.9666),
        (99.99, ASYMMETRIC): (-9.6227, 9.7281), (99.99, SYMMETRIC): (-9.6886, 9.6886),
        "entropy": (-8.4363, 8.4495),
    },
    "gamma": {
        (99, ASYMMETRIC): (-0.4008, 6.8835), (99, SYMMETRIC): (-0.4959, 6.1509),
        (99.9, ASYMMETRIC): (-0.4700, 9.6894), (99.9, SYMMETRIC): (-0.4959, 8.7840),
        (99.99, ASYMMETRIC): (-0.4959, 12.5506), (99.99, SYMMETRIC): (-0.4959, 11.1753),
        "entropy": (-0.4959, 12.7026),
    },
}  # fmt: skip


def published(kind: str) -> np.ndarray:
    """float32 [99991]: the values that ONNX_RUNTIME is of."""
    generator = np.random.default_rng(0)
    drawn = {
        "normal": generator.normal(size=99_991),
        "laplace": generator.laplace(size=99_991),
        "gamma": generator.gamma(2.0, size=99_991) - 0.5,
    }
    return drawn[kind].astype(np.float32)


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC])
@pytest.mark.parametrize("percentile", [99, 99.9, 99.99])
@pytest.mark.parametrize("kind", list(ONNX_RUNTIME))
def test_percentiles_are_those_of_onnx_runtime_within_a_bin_of_each(
    kind: str, percentile: float, scheme: Scheme
) -> None:
    x = published(kind)
    found = range_percentile(statistics(torch.from_numpy(x)), EIGHT, scheme, percentile)
    expected = ONNX_RUNTIME[kind][percentile, scheme]  # type: ignore[index]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=float(np.abs(x).max()) / 1024 + abs(theirs) / 512)


@pytest.mark.parametrize("kind", list(ONNX_RUNTIME))
def test_entropy_is_near_onnx_runtimes(kind: str) -> None:
    # Where its definition differs the least: as many steps, values of both signs, no zeros. The divergence is flat
    # around its minimum, and the groups of bins differ.
    x = published(kind)
    found = range_entropy(statistics(torch.from_numpy(x)), EIGHT, SYMMETRIC, 2048)
    assert found == pytest.approx(ONNX_RUNTIME[kind]["entropy"], rel=0.12)  # type: ignore[index]


def test_entropy_cuts_an_outlier_off() -> None:
    assert range_entropy(statistics(values("outlier")), EIGHT, ASYMMETRIC, 2048)[1] < 20


@pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC])
@pytest.mark.parametrize("name", list(RECORDED))
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_scale_with_the_values_and_lie_within_them(kind: str, name: str, scheme: Scheme) -> None:
    x = values(kind, 4000)
    low, high = solver(RECORDED[name])(statistics(x), EIGHT, scheme)
    assert float(x.min()) <= low <= high <= float(x.max())
    for exponent in (-10, 10, 90):
        scaled = solver(RECORDED[name])(statistics(x * 2.0**exponent), EIGHT, scheme)
        assert scaled == pytest.approx((low * 2.0**exponent, high * 2.0**exponent), rel=1e-6)


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_the_negatives_are_the_negatives_of_the_ranges(kind: str, name: str) -> None:
    x = values(kind, 4000)
    for scheme in (ASYMMETRIC, SYMMETRIC):
        low, high = solver(RECORDED[name])(statistics(x), EIGHT, scheme)
        assert solver(RECORDED[name])(statistics(-x), EIGHT, scheme) == pytest.approx((-high, -low), rel=1e-6)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", list(RECORDED))
def test_constant_zero_tiny_and_huge_tensors_have_sound_parameters(name: str, bits: int, scheme: str) -> None:
    normal = values("normal", 1000)
    qconfig = settings(activation_scheme=scheme, activation_bits=bits)
    tensors = {
        "zero": torch.zeros(50), "one": torch.full((1,), 0.3), "constant": torch.full((50,), 0.7),
        "negative": torch.full((50,), -3.0), "tiny": 1e-30 * normal, "huge": 1e30 * normal,
        "tiny, one-sided": 1e-30 * normal.abs(), "huge, one-sided": 1e30 * normal.abs(),
    }  # fmt: skip
    for kind, x in tensors.items():
        observer, minmax = activation_observer(qconfig, RECORDED[name])(), activation_observer(qconfig, MINMAX)()
        observer(x)
        minmax(x)
        (scale, zero_point), (widest, its_zero_point) = observer.calculate_qparams(), minmax.calculate_qparams()
        assert torch.isfinite(scale).all(), kind
        assert (scale > 0).all(), kind
        assert (scale <= widest).all(), kind
        assert (zero_point >= 0).all(), kind
        assert (zero_point < 2**bits).all(), kind
        # Symmetric steps don't end on the peak, and a constant may be better off with other ones.
        if kind == "zero" or kind.startswith("tiny") or (name != "mse" and not kind.startswith("huge")):
            assert torch.equal(scale, widest), kind
            assert torch.equal(zero_point, its_zero_point), kind


def test_moving_averages_follow_the_batches() -> None:
    found = merge(statistics(torch.tensor([-1.0, 4.0])), statistics(torch.tensor([-2.0, 8.0])))
    assert range_moving_average(found, EIGHT, ASYMMETRIC, 0.25) == (-1.25, 5.0)
    assert range_moving_average(found, EIGHT, ASYMMETRIC, 1.0) == (-2.0, 8.0)


def test_a_parameter_that_is_needed_is_never_guessed() -> None:
    with pytest.raises(ValueError, match=r"observer\.percentile has no value"):
        solver(Observer(ActivationObserver.percentile))


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_weights_that_are_executed_have_the_scales_of_mse(flow: FlowName, granularity: Granularity) -> None:
    net, example = trained(Chain()), images()
    scales = {}
    for name in ("minmax", "mse"):
        qconfig = settings(str(granularity), weight_bits=4, weight_observer=name)
        prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), example), spec(qconfig), example)
        calibrate(prepared, [example])
        asked = torch_layers.read_qparams(prepared.module)
        converted = FLOWS[flow].convert(prepared).module
        executed = torch_layers.read_qparams(converted)
        weights = [key for key in asked if key.endswith(".weight")]
        assert len(weights) == 4
        for key in weights:
            assert np.array_equal(asked[key].scale, executed[key].scale)
        scales[name] = {key: asked[key].scale for key in weights}
    assert all((scales["mse"][key] <= scales["minmax"][key]).all() for key in scales["mse"])
    assert any((scales["mse"][key] < scales["minmax"][key]).any() for key in scales["mse"])
