"""From a tensor's statistics to the range that is quantized: a pure function for each observer.

`range_<observer>(stats, grid, scheme, …)` returns (low, high), within the observed extremes; torch's formula computes
scale and zero point from them. Values are taken to be spread evenly over their bin of the fine histogram (see
tensor_statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from qexp.config.schema import ActivationObserver, Observer, Scheme
from qexp.quantize.calibration.grid import QUANT_MAX, Grid

if TYPE_CHECKING:
    from qexp.quantize.calibration.tensor_statistics import Bins, TensorStats

Solver = Callable[["TensorStats", Grid, Scheme], tuple[float, float]]

SMALLEST_SCALE = float(np.finfo(np.float32).eps)
"""torch makes no scale smaller than this."""

# The search for the smallest error shrinks a range by up to 12 octaves, first in coarse steps, then twice around the
# best in steps 8 times finer. A single end is found to 0.14%, two ends to 0.5%.
_OCTAVES = 12
_COARSE_ONE = 1 / 8
_COARSE_TWO = 1 / 2
_FINER = 8
_ROUNDS = 3
# Weights of a channel: bins of the histogram from -peak to peak, and steps of a candidate's end from 0 to the peak.
_ROW_BINS = 4096
_ROW_STEPS = {Scheme.symmetric: 128, Scheme.asymmetric: 32}
_SMOOTHED = 1e-4
_ROW_BLOCK = 256  # channels at a time, to bound memory


def solver(observer: Observer) -> Solver:
    """Return the function that finds this observer's range. Raises ValueError if a parameter is missing."""
    parameters = {name: getattr(observer, name) for name in observer.name.parameters}
    missing = [name for name, value in parameters.items() if value is None]
    if missing:
        raise ValueError(f"observer.{missing[0]} has no value")
    return partial(SOLVERS[observer.name], **parameters)


def range_minmax(stats: TensorStats, grid: Grid, scheme: Scheme) -> tuple[float, float]:
    """Return the smallest and the largest value, bit for bit those of torch's MinMaxObserver."""
    return stats.low, stats.high


def range_moving_average(
    stats: TensorStats, grid: Grid, scheme: Scheme, averaging_constant: float
) -> tuple[float, float]:
    """Return exponential moving averages of the batches' extremes, in float32.

    They are bit for bit those of torch's MovingAverageMinMaxObserver.
    """
    share = np.float32(averaging_constant)
    low, high = stats.minima[0], stats.maxima[0]
    for smallest, largest in zip(stats.minima[1:], stats.maxima[1:], strict=True):
        low, high = low + share * (smallest - low), high + share * (largest - high)
    return float(low), float(high)


def _clipped(stats: TensorStats, low: float, high: float) -> tuple[float, float]:
    """Return the observed extremes, clipped to low…high."""
    return min(max(stats.low, low), high), max(min(stats.high, high), low)


def range_percentile(stats: TensorStats, grid: Grid, scheme: Scheme, percentile: float) -> tuple[float, float]:
    """Return the range without the most extreme values.

    On a symmetric grid, percentile% of the absolute values lie inside; on an asymmetric one, half of the rest is cut at
    either end. 100 is minmax.

    ONNX Runtime's PercentileCalibrater has the same definition, but returns the lower edge of the bin that contains the
    quantile, where this function interpolates within the bin. Its 2,048 bins from -peak to peak are all peak/1024 wide,
    so that an outlier blurs all other quantiles; bins here are at most 0.2% of the value wide.
    """
    share = percentile / 100
    if scheme is Scheme.symmetric:
        bound = _quantile(stats.magnitudes, share)
        return _clipped(stats, -bound, bound)
    kept = (1 + share) / 2
    return -_quantile(stats.bins.mirrored(), kept), _quantile(stats.bins, kept)


def _quantile(bins: Bins, share: float) -> float:
    """Return the value below which this share of all values lies."""
    below = np.cumsum(bins.counts)
    rank = share * below[-1]
    i = min(int(np.searchsorted(below, rank)), len(below) - 1)
    above = (below[i] - rank) / bins.counts[i]
    return float(bins.upper[i] - above * (bins.upper[i] - bins.lower[i]))


def range_mse(stats: TensorStats, grid: Grid, scheme: Scheme) -> tuple[float, float]:
    """Return the range with the smallest expected squared error on this grid, from rounding and clipping.

    The error of a range is exact for the histogram (see `_Error`). The search is over one number if the grid is
    symmetric or all values have one sign, else over both ends independently. Values that occur very often, such as the
    upper bound of a clamp, are taken to be spread over their bin, too.
    """
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if low == high:
        return stats.low, stats.high
    error = _Error.of(stats.bins, grid, scheme)
    together = scheme is Scheme.symmetric or low == 0 or high == 0
    if scheme is Scheme.symmetric:
        low, high = -max(-low, high), max(-low, high)
    step = _COARSE_ONE if together else _COARSE_TWO
    shrunk_low = shrunk_high = np.arange(0, _OCTAVES, step)
    for _ in range(_ROUNDS):
        if together:
            lows, highs = low * 2.0**-shrunk_low, high * 2.0**-shrunk_high
        else:
            lows, highs = (
                ends.ravel() for ends in np.meshgrid(low * 2.0**-shrunk_low, high * 2.0**-shrunk_high, indexing="ij")
            )
        best = int(error(lows, highs).argmin())  # the first of equals is the widest
        around = step * np.linspace(-1, 1, 2 * _FINER + 1)
        at_low, at_high = (best, best) if together else divmod(best, len(shrunk_high))
        shrunk_low = (shrunk_low[at_low] + around).clip(0, None)
        shrunk_high = (shrunk_high[at_high] + around).clip(0, None)
        step /= _FINER
    return _clipped(stats, float(lows[best]), float(highs[best]))


def _scales(
    lows: np.ndarray, highs: np.ndarray, grid: Grid, scheme: Scheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, by torch's formula, each range's scale, and its first and last step relative to the zero point."""
    width = grid.qmax - grid.qmin
    if scheme is Scheme.symmetric:
        scale = np.maximum(np.maximum(-lows, highs) / (width / 2), SMALLEST_SCALE)
        # Unsigned: 128 of 0…255, and the middle rounded down of a narrower grid.
        zero = np.full(len(scale), 0.0 if grid.qmin < 0 else (grid.qmin + grid.qmax + grid.full) // 2)
    else:
        scale = np.maximum((highs - lows) / width, SMALLEST_SCALE)
        zero = np.clip(grid.qmin - np.rint(lows / scale), grid.qmin, grid.qmax)
    return scale, grid.qmin - zero, grid.qmax - zero


@dataclass(frozen=True, eq=False)
class _Error:
    """The sum of squared errors of a histogram's values, as a function of the range.

    A call takes time in proportion to the steps of the grid, whatever the number of bins; on a grid of more than 8
    bits, to the number of bins.

    With borders b[k] halfway between the steps c[k] and c[k+1], and N(x), S(x) the number and the sum of the values
    below x, the sum over all steps of (value - c[k])² is, summed by parts,
    Σ value² - 2·(c[last]·S(∞) - scale·Σ S(b[k])) + c[last]²·N(∞) - Σ (c[k+1]² - c[k]²)·N(b[k]).
    """

    bins: Bins
    density: np.ndarray
    numbers: np.ndarray  # number of values below each bin, and of all values at the end
    sums: np.ndarray
    squares: float
    grid: Grid
    scheme: Scheme

    @staticmethod
    def of(bins: Bins, grid: Grid, scheme: Scheme) -> _Error:
        lower, upper, counts = bins.lower, bins.upper, bins.counts
        width = upper - lower
        return _Error(
            bins,
            np.divide(counts, width, out=np.zeros(len(counts)), where=width > 0),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.float64),
            np.concatenate([[0], np.cumsum(counts * (lower + upper) / 2)]),
            float((counts * (lower * lower + lower * upper + upper * upper) / 3).sum()),
            grid,
            scheme,
        )

    def __call__(self, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
        """Return the error of each range, float64 [n]. lows, highs: float64 [n], low ≤ 0 ≤ high."""
        scale, first, last = _scales(lows, highs, self.grid, self.scheme)
        if self.grid.qmax - self.grid.qmin > QUANT_MAX:
            return self._by_bins(scale, first, last)
        step = first[:, None] + np.arange(self.grid.qmax - self.grid.qmin)
        number, total = self._below((step + 0.5) * scale[:, None])
        end = last * scale
        mixed = end * self.sums[-1] - scale * total.sum(axis=1)
        steps = end**2 * self.numbers[-1] - scale**2 * ((2 * step + 1) * number).sum(axis=1)
        error: np.ndarray = self.squares - 2 * mixed + steps
        return error

    def _by_bins(self, scale: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return the same sum, added up over the bins (see `_row_candidates`)."""
        ends = []
        for edges in (self.bins.lower, self.bins.upper):
            t = edges / scale[:, None]
            n = np.rint(t).clip(first[:, None], last[:, None])
            ends.append(n / 12 + (t - n) ** 3 / 3)
        error: np.ndarray = scale**3 * ((ends[1] - ends[0]) * self.density).sum(axis=1)
        return error

    def _below(self, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return number and sum of the values below each border."""
        bins = np.searchsorted(self.bins.upper, borders)
        inside = np.minimum(bins, len(self.density) - 1)
        lower = self.bins.lower[inside]
        reach = borders.clip(lower, self.bins.upper[inside])
        part = self.density[inside] * (reach - lower) * (bins == inside)
        return self.numbers[bins] + part, self.sums[bins] + part * (lower + reach) / 2


def range_mse_rows(rows: np.ndarray, grid: Grid, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Return `range_mse` of each row of float32 [rows, n], a channel of a weight: low and high, float32 [rows].

    Every row is scaled to a peak of 1, so that all rows share one table of candidates' errors over a histogram of 4,096
    bins. The candidates' ends are 1/128 of the peak apart on a symmetric grid, 1/32 on an asymmetric one. For a channel
    of 600 values the error is up to 8% and 6% above the minimum (20% on the four steps of asymmetric 2 bits).
    """
    lows, highs, errors = _row_candidates(grid, scheme)
    found = []
    for start in range(0, len(rows), _ROW_BLOCK):
        block = rows[start : start + _ROW_BLOCK]
        low, high = block.min(axis=1), block.max(axis=1)
        peak = np.maximum(-low, high)
        index = block / np.where(peak > 0, peak, 1)[:, None]
        index = ((index + 1) * (_ROW_BINS / 2)).astype(np.int64).clip(0, _ROW_BINS - 1)
        index += _ROW_BINS * np.arange(len(block))[:, None]
        histograms = np.bincount(index.ravel(), minlength=_ROW_BINS * len(block)).reshape(len(block), _ROW_BINS)
        best = (histograms @ errors).argmin(axis=1)
        found.append([end.clip(lows[best] * peak, highs[best] * peak) for end in (low, high)])
    low, high = (np.concatenate(ends).astype(np.float32) for ends in zip(*found, strict=True))
    return low, high


@lru_cache(maxsize=2)
def _row_candidates(grid: Grid, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the candidates' lows and highs, widest first, and their mean squared errors, [bins, candidates].

    ∫(t - n)² dt from 0 to t, with n the step to which t rounds, is n/12 + (t - n)³/3; beyond the last step, n is the
    last.
    """
    steps = _ROW_STEPS[scheme]
    ends = np.arange(steps, 0, -1) / steps
    if scheme is Scheme.symmetric:
        lows, highs = -ends, ends
    else:
        ends = np.append(ends, 0)
        lows, highs = (ends.ravel()[:-1] for ends in np.meshgrid(-ends, ends, indexing="ij"))
    edges = np.linspace(-1, 1, _ROW_BINS + 1)
    scale, first, last = (value[:, None] for value in _scales(lows, highs, grid, scheme))
    t = edges / scale
    n = np.rint(t).clip(first, last)
    errors = np.diff(n / 12 + (t - n) ** 3 / 3) * scale**3 / (edges[1] - edges[0])
    return lows, highs, np.ascontiguousarray(errors.T)


def range_entropy(stats: TensorStats, grid: Grid, scheme: Scheme, bins: int) -> tuple[float, float]:
    """Return the range whose quantized distribution has the least Kullback-Leibler divergence from the original.

    As TensorRT's calibrator does (S. Migacz, 8-bit Inference with TensorRT, GTC 2017): take a linear histogram with
    `bins` bins from -peak to peak; for each threshold, add the counts outside of ±threshold to the outermost bins
    inside, and compare this with the counts inside, averaged within each step of the grid. If all values have one sign
    and the grid is asymmetric, the histogram goes from 0 to the peak. The widest of equal thresholds is taken. A linear
    bin narrower than a bin of the fine histogram (near the peak, for more than 512 bins from 0 to it) gets its share.

    ONNX Runtime's EntropyCalibrater differs: it has 128 steps whatever the grid is, and a two-sided histogram even for
    values of one sign, half of whose steps are then idle. Bins that don't divide evenly into its steps go to the last
    one, and are compared with nothing; a step's mass goes to its empty bins, too, rounded down to whole counts. Exact
    zeros count there and are left out here: zero is a step of every grid, so they say nothing about the range (NVIDIA's
    pytorch-quantization does the same). With its default of 128 bins it has one candidate, which is minmax.
    """
    levels = grid.qmax - grid.qmin + 1
    one_sided = scheme is Scheme.asymmetric and (stats.low >= 0 or stats.high <= 0)
    peak = max(-stats.low, stats.high)
    seen = stats.bins.mirrored() if one_sided and stats.high <= 0 else stats.bins
    edges = np.linspace(0 if one_sided else -peak, peak, (bins if one_sided else bins // 2 * 2) + 1)
    counts = _rebinned(seen, edges)
    if not counts.any():
        return stats.low, stats.high
    middle = 0 if one_sided else len(counts) // 2
    reach = np.arange(len(counts) - middle, max(1, levels if one_sided else levels // 2) - 1, -1)
    start = np.zeros_like(reach) if one_sided else middle - reach
    divergence = _divergence(counts, start, middle + reach, levels)
    threshold = float(edges[middle + reach[divergence.argmin()]])
    return _clipped(stats, -threshold, threshold)


def _rebinned(bins: Bins, edges: np.ndarray) -> np.ndarray:
    """Return the counts between neighbouring edges, float64 [edges - 1], without exact zeros and subnormals."""
    tiny = np.finfo(np.float32).tiny
    counts = np.where((bins.lower < tiny) & (bins.upper > -tiny), 0, bins.counts)
    width = bins.upper - bins.lower
    density = np.divide(counts, width, out=np.zeros(len(counts)), where=width > 0)
    below = np.concatenate([[0], np.cumsum(counts)])
    position = np.searchsorted(bins.upper, edges[:-1])
    inside = np.minimum(position, len(counts) - 1)
    part = density[inside] * (edges[:-1] - bins.lower[inside]).clip(0, None) * (position == inside)
    # All values are below the last edge, which is the peak.
    return np.diff(np.append(below[position] + part, below[-1])).clip(0, None)


def _divergence(counts: np.ndarray, start: np.ndarray, stop: np.ndarray, levels: int) -> np.ndarray:
    """Return KL(p || q) for each window counts[start:stop], float64 [windows]; infinite if the window is empty.

    p: the window, with the counts outside of it added to its first and last bin; q: the window in `levels` equal
    groups, each group's mass spread evenly over its bins that are not empty in p. Both are normalised, so with groups g
    of mass P and Q over m such bins, KL = (Σ p·log p - Σ P·log(Q/m)) / Σp - log Σp + log Σq. If Q is 0 and P is not,
    each of the bins has 1/10,000 of a count in q, as in the smoothing of MXNet and ONNX Runtime.
    """
    mass, whole = np.append(0.0, np.cumsum(counts)), counts.sum()
    outside_low, outside_high = mass[start], np.append(np.cumsum(counts[::-1])[::-1], 0.0)[stop]
    filled = np.append(0, np.cumsum(counts > 0))
    information = np.append(0.0, np.cumsum(_x_log_x(counts)))

    borders = start[:, None] + (np.arange(levels + 1) * (stop - start)[:, None]) // levels
    q = np.diff(mass[borders])
    p, m = q.copy(), np.diff(filled[borders]).astype(np.float64)
    entropy = information[stop] - information[start]
    for group, end, outside in ((0, start, outside_low), (-1, stop - 1, outside_high)):
        p[:, group] += outside
        m[:, group] += (counts[end] == 0) & (outside > 0)
        entropy += _x_log_x(counts[end] + outside) - _x_log_x(counts[end])

    inside = q.sum(axis=1)
    q = np.where((q == 0) & (p > 0), _SMOOTHED * m, q)
    share = np.log(q / np.maximum(m, 1), out=np.zeros_like(q), where=q > 0)
    found = (entropy - (p * share).sum(axis=1)) / whole - np.log(whole) + np.log(q.sum(axis=1))
    return np.where(inside > 0, found, np.inf)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(x, out=np.zeros(x.shape), where=x > 0)


SOLVERS: dict[ActivationObserver, Callable[..., tuple[float, float]]] = {
    ActivationObserver.minmax: range_minmax,
    ActivationObserver.moving_average: range_moving_average,
    ActivationObserver.percentile: range_percentile,
    ActivationObserver.mse: range_mse,
    ActivationObserver.entropy: range_entropy,
}
