from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as distributions

from qexp import statistics
from qexp.records import Predictions, Verdict, VerdictKind
from qexp.report import sentences

Z95 = distributions.norm.isf(0.025)


def predictions(logits: np.ndarray, labels: np.ndarray | None = None) -> Predictions:
    labels = np.zeros(len(logits), dtype=np.int64) if labels is None else labels
    return Predictions(logits.astype(np.float32), labels, tuple(str(index) for index in range(len(logits))))


def one_hot(classes: list[int]) -> np.ndarray:
    return np.eye(4)[classes] * 5


# ---- Tango's interval and test


@pytest.mark.parametrize(
    ("first_only", "second_only", "n", "confidence", "low", "high", "digits"),
    [
        # R: PropCIs::scoreci.mp(25, 28, 618, 0.90), version 0.3-0.
        (25, 28, 618, 0.90, -0.0148, 0.0247, 4),
        # R: contingencytables::Tango_asymptotic_score_CI_paired_2x2(cavo_2012), version 3.0.0, whose table is
        # (59, 6; 16, 80) and whose difference is first minus second: -0.1240 to -0.0054.
        (6, 16, 161, 0.95, 0.0054, 0.1240, 4),
        # R: ratesci::scorepair on c(1, 1, 7, 12), first minus second: -0.517 to -0.026. Bentur et al. 2009.
        (1, 7, 21, 0.95, 0.026, 0.517, 3),
    ],
)
def test_tango_equals_published_intervals(
    first_only: int, second_only: int, n: int, confidence: float, low: float, high: float, digits: int
) -> None:
    interval = statistics.tango(first_only, second_only, n, confidence)
    assert (round(interval.low, digits), round(interval.high, digits)) == (low, high)
    assert interval.value == (second_only - first_only) / n
    assert interval.confidence == confidence


def profile_z(d: float, b: int, c: int, n: int) -> float:
    """The score test from first principles: Pearson's chi-square of the trinomial, its nuisance parameter by search."""

    def negative_log_likelihood(share: float) -> float:
        counts, chances = np.array([b, c, n - b - c]), np.array([share, share + d, 1 - 2 * share - d])
        if (chances < 0).any() or (chances[counts > 0] <= 0).any():
            return np.inf
        return -float(counts[counts > 0] @ np.log(chances[counts > 0]))

    low, high = max(0.0, -d), (1 - d) / 2
    share = optimize.minimize_scalar(
        negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    return (c - b - n * d) / math.sqrt(n * (2 * share + d - d**2))


def test_the_score_equals_a_numerical_maximum_of_the_likelihood_for_every_small_table() -> None:
    for n in (1, 3, 6):
        for b in range(n + 1):
            for c in range(n + 1 - b):
                for d in (-0.9, -0.4, -0.05, 0.02, 0.3, 0.8):
                    found = float(statistics.tango_z(d, b, c, n))
                    assert found == pytest.approx(profile_z(d, b, c, n), rel=2e-4, abs=1e-5), (b, c, n, d)


def test_the_interval_is_all_differences_that_the_score_test_does_not_reject() -> None:
    grid = np.linspace(-1, 1, 20001)
    for b, c, n in ((0, 0, 30), (1, 0, 30), (4, 9, 30), (0, 12, 30), (30, 0, 30), (7, 7, 14)):
        kept = grid[np.abs(statistics.tango_z(grid, b, c, n)) <= Z95]
        interval = statistics.tango(b, c, n)
        assert interval.low == pytest.approx(kept[0], abs=1.01e-4)
        assert interval.high == pytest.approx(kept[-1], abs=1.01e-4)


def test_swapping_the_two_models_mirrors_the_interval() -> None:
    for b, c, n in ((3, 11, 200), (0, 4, 50), (17, 0, 17), (0, 0, 10)):
        one, other = statistics.tango(b, c, n), statistics.tango(c, b, n)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)


def test_the_score_falls_as_the_hypothesis_grows() -> None:
    grid = np.linspace(-1, 1, 4001)
    for b, c, n in ((0, 0, 10), (1, 0, 1), (3, 11, 200), (40, 2, 10000)):
        assert (np.diff(statistics.tango_z(grid, b, c, n)) < 1e-9).all()


def test_the_interval_has_width_when_no_prediction_differs() -> None:
    interval = statistics.tango(0, 0, 899)
    # Without a disagreement the ends solve n d^2 = z^2 d (1 - d): d = z^2 / (n + z^2).
    assert interval.high == pytest.approx(Z95**2 / (899 + Z95**2), rel=1e-9)
    assert interval.low == pytest.approx(-interval.high, rel=1e-9)


def test_all_images_discordant_and_no_images_have_intervals() -> None:
    assert statistics.tango(20, 0, 20).low == pytest.approx(-1)
    assert -1 < statistics.tango(20, 0, 20).high < -0.5
    nothing = statistics.tango(0, 0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (-1, 1)


@pytest.mark.parametrize(("b", "c", "n"), [(-1, 0, 5), (3, 3, 5)])
def test_counts_that_are_no_table_are_refused(b: int, c: int, n: int) -> None:
    with pytest.raises(ValueError, match="no paired table"):
        statistics.tango(b, c, n)


def test_non_inferiority_and_the_lower_end_of_the_interval_agree() -> None:
    for b, c, n, confidence in ((12, 9, 899, 0.95), (60, 20, 10000, 0.9), (0, 0, 400, 0.95)):
        low = statistics.tango(b, c, n, confidence).low
        assert statistics.non_inferiority(b, c, n, -low) == pytest.approx((1 - confidence) / 2, rel=1e-6)


def test_a_margin_of_nothing_makes_the_score_test_mcnemars() -> None:
    # At d = 0 the score is (c - b) / sqrt(b + c), McNemar's. contingencytables gives Z = -2.132 for cavo_2012.
    assert float(statistics.tango_z(0, 6, 16, 161)) == pytest.approx(2.132, abs=5e-4)


def exact_coverage(n: int, expected: float, share_of_second: float) -> float:
    """The probability that the 95% interval holds the true difference, summed over all tables."""
    chance_b, chance_c = expected / n * (1 - share_of_second), expected / n * share_of_second
    b, c = (
        np.arange(min(n, int(mean + 12 * math.sqrt(mean) + 25)) + 1)
        for mean in (expected * (1 - share_of_second), expected * share_of_second)
    )
    table = distributions.binom.pmf(b, n, chance_b)[:, None] * distributions.binom.pmf(
        c[None, :], np.maximum(n - b, 0)[:, None], chance_c / (1 - chance_b)
    )
    assert table.sum() == pytest.approx(1, abs=1e-9)
    return float(table[np.abs(statistics.tango_z(chance_c - chance_b, b[:, None], c[None, :], n)) <= Z95].sum())


@pytest.mark.parametrize("n", [500, 10_000])
def test_exact_coverage_never_falls_below_what_discreteness_costs(n: int) -> None:
    expected = (1, 1.5, 2, 3, 4.4, 5, 6.2, 7.4, 10, 13, 20, 22, 28, 50, 100, 150)
    coverage = {(e, share): exact_coverage(n, e, share) for e in expected for share in (0, 0.04, 0.12, 0.2, 0.3, 0.5)}
    # 0.9292 at n = 500, 6.2 and 12% is the worst of a grid of 0.1 disagreements by 2%, which these points are from.
    assert min(coverage.values()) >= 0.929
    assert max(value for (e, _), value in coverage.items() if e >= 20) <= 0.97


@pytest.mark.slow
def test_simulated_coverage_of_tangos_interval(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1998)
    coverage = {}
    for n in (500, 10_000):
        for expected in (1, 2, 3, 5, 10, 20, 35, 50, 75, 100, 150):
            for share in (0.5, 0.25, 0.0):
                chances = np.array([1 - share, share]) * expected / n
                tables = rng.multinomial(n, [*chances, 1 - chances.sum()], 2000)
                low, high = statistics.tango_bounds(tables[:, 0], tables[:, 1], n)
                truth = chances[1] - chances[0]
                coverage[n, expected, share] = float(np.mean((low <= truth) & (truth <= high)))
    worst = min(coverage, key=lambda key: coverage[key])
    with capsys.disabled():
        print(f"\nworst coverage {coverage[worst]:.4f} at n, expected disagreements, share of the second = {worst}")
    assert coverage[worst] >= 0.93
    assert max(value for (_, expected, _), value in coverage.items() if expected >= 20) <= 0.97


# ---- The mean of per-image values, such as the difference over several calibration seeds

SIGNS = np.array([-1.0, 0.0, 1.0])
THIRDS = np.arange(-3, 4) / 3


def test_the_mean_score_of_one_seed_is_tangos() -> None:
    rng = np.random.default_rng(0)
    b, c = rng.integers(0, 12, 60), rng.integers(0, 12, 60)
    b[:10], c[5:15] = 0, 0
    n = b + c + rng.choice([0, 1, 30, 700], 60)
    n = np.maximum(n, 1)
    counts = np.stack([b, n - b - c, c], axis=-1)
    for d in (-0.6, -0.005, 0.0, 0.02, 0.7):
        found = statistics.mean_score_z(SIGNS, counts, d)
        np.testing.assert_allclose(found, statistics.tango_z(d, b, c, n), rtol=1e-7, atol=1e-7)
    low, high = statistics.mean_score_interval(SIGNS, counts)
    np.testing.assert_allclose([low, high], statistics.tango_bounds(b, c, n), atol=1e-8)


def most_likely(counts: np.ndarray, mean: float) -> np.ndarray:
    """The shares of THIRDS of the largest likelihood among those of this mean, by a general optimiser."""
    seen = counts > 0

    def loss(p: np.ndarray) -> float:
        return -float(counts[seen] @ np.log(np.maximum(p[seen], 1e-300))) / counts.sum()

    constraints = [{"type": "eq", "fun": lambda p: p.sum() - 1}, {"type": "eq", "fun": lambda p: p @ THIRDS - mean}]
    best = None
    for start in (np.full(7, 1 / 7), (counts + 0.5) / (counts + 0.5).sum()):
        found = optimize.minimize(
            loss, start, method="SLSQP", bounds=[(0, 1)] * 7, constraints=constraints,
            options={"ftol": 1e-14, "maxiter": 2000},
        )  # fmt: skip
        if abs(found.x.sum() - 1) < 1e-8 and (best is None or found.fun < best.fun):
            best = found
    assert best is not None
    return np.asarray(best.x)


@pytest.mark.parametrize("mean", [-0.4, -0.03, 0.0, 0.2])
def test_the_mean_scores_variance_is_that_of_the_most_likely_multinomial(mean: float) -> None:
    tables = [[3, 2, 4, 80, 3, 1, 2], [0, 0, 2, 90, 5, 0, 0], [0, 4, 0, 60, 0, 0, 0], [0, 0, 0, 50, 0, 0, 0]]
    for counts in np.array(tables, dtype=np.float64):
        p, n = most_likely(counts, mean), counts.sum()
        spread = math.sqrt(n * float(p @ (THIRDS - mean) ** 2))
        numerator = float(counts @ THIRDS - n * mean)
        found = float(statistics.mean_score_z(THIRDS, counts, mean))
        expected = numerator / spread if spread > 1e-3 else 0.0
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6), counts


def test_the_mean_score_falls_as_the_hypothesis_grows_and_its_interval_widens_with_z() -> None:
    rng = np.random.default_rng(1)
    counts = rng.multinomial(800, [0.01, 0.01, 0.02, 0.92, 0.02, 0.01, 0.01], size=20)
    grid = np.linspace(-0.9, 0.9, 37)
    assert (np.diff(statistics.mean_score_z(THIRDS, counts[:, None, :], grid), axis=1) < 1e-9).all()
    low, high = statistics.mean_score_interval(THIRDS, counts)
    wide_low, wide_high = statistics.mean_score_interval(THIRDS, counts, np.full(20, 3.0))
    mean = counts @ THIRDS / 800
    assert (wide_low < low).all()
    assert (low < mean).all()
    assert (mean < high).all()
    assert (high < wide_high).all()
    np.testing.assert_allclose(statistics.mean_score_z(THIRDS, counts, wide_low), 3.0, atol=1e-4)


def test_the_mean_score_of_other_scales_moves_with_them() -> None:
    counts = np.array([5, 3, 80, 9])
    values = np.array([-2.0, -1.0, 0.0, 2.0])
    found = statistics.mean_score_z(values, counts, 0.1, lowest=-2, highest=2)
    assert found == pytest.approx(float(statistics.mean_score_z(values / 2, counts, 0.05)))


def test_no_images_tell_nothing() -> None:
    assert float(statistics.mean_score_z(SIGNS, np.zeros(3), -0.01)) == 0
    low, high = statistics.mean_score_interval(SIGNS, np.zeros(3))
    assert (float(low), float(high)) == pytest.approx((-1, 1))


def test_holm_equals_rs() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005, 1), "holm")
    found = statistics.holm([0.01, 0.04, 0.03, 0.005, 1])
    assert found == pytest.approx([0.04, 0.09, 0.09, 0.025, 1.0])
    assert len(statistics.holm([])) == 0


@pytest.mark.parametrize(("shares", "level"), [((0.006, 0.004), 0.025 / 48), ((0.0, 0.0), 0.025 / 48)])
def test_that_many_images_qualify_in_four_cases_of_five(shares: tuple[float, float], level: float) -> None:
    n, margin = 10_000, 0.01
    b, c = (round(n * share) for share in shares)
    needed = statistics.images_to_qualify(SIGNS, np.array([b, n - b - c, c]), margin, level)
    assert needed is not None
    drawn = np.random.default_rng(2).multinomial(needed, [shares[0], 1 - sum(shares), shares[1]], size=4000)
    power = np.mean(distributions.norm.sf(statistics.mean_score_z(SIGNS, drawn, -margin)) <= level)
    assert power > 0.76
    if any(shares):
        assert power < 0.86


def test_no_number_of_images_qualifies_what_loses_the_margin() -> None:
    assert statistics.images_to_qualify(SIGNS, np.array([10, 90, 0]), 0.1, 0.025) is None
    assert statistics.images_to_qualify(SIGNS, np.zeros(3), 0.1, 0.025) is None


def test_images_without_a_disagreement_can_still_be_too_few() -> None:
    """744 images and a margin of 0.5 points can't qualify any of 48 settings; about 2,200 without a disagreement do."""
    nothing = np.array([0, 744, 0])
    p = float(distributions.norm.sf(statistics.mean_score_z(SIGNS, nothing, -0.005)))
    assert 0.025 / 48 < p == pytest.approx(statistics.non_inferiority(0, 0, 744, 0.005))
    needed = statistics.images_to_qualify(SIGNS, nothing, 0.005, 0.025 / 48)
    assert needed is not None
    assert 2150 < needed < 6000


# ---- Wilson, McNemar


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_newcombes_table(correct: int, n: int, low: float, high: float) -> None:
    interval = statistics.wilson(correct, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert interval.value == correct / n


def test_wilson_of_no_images_is_everything() -> None:
    interval = statistics.wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.low, interval.high) == (0, 1)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (6, 16, 0.052479),  # R: contingencytables::McNemar_exact_cond_test_paired_2x2(cavo_2012)
        (121, 59, 4.434e-06),  # statsmodels: mcnemar([[101, 121], [59, 33]], exact=True)
        (0, 0, 1.0),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_equals_published_values(b: int, c: int, p: float) -> None:
    assert statistics.mcnemar(b, c) == pytest.approx(p, rel=2e-4)
    assert statistics.mcnemar(c, b) == statistics.mcnemar(b, c)


def test_mcnemar_equals_the_enumeration_of_all_signs() -> None:
    for b, c in ((0, 1), (1, 7), (2, 3), (0, 9), (4, 8)):
        n = b + c
        ways = [math.comb(n, k) for k in range(n + 1)]
        brute = sum(way for way in ways if way <= ways[b]) / 2**n
        assert statistics.mcnemar(b, c) == pytest.approx(brute, rel=1e-12)


# ---- Predictions


def test_discordant_counts_and_agreement_of_a_small_example() -> None:
    labels = np.array([0, 1, 2, 3, 0])
    first = predictions(one_hot([0, 1, 2, 0, 1]), labels)  # right, right, right, wrong, wrong
    second = predictions(one_hot([0, 1, 0, 3, 2]), labels)  # right, right, wrong, right, wrong otherwise
    assert statistics.discordant(first, second) == (1, 1, 5)
    assert statistics.agreement(first, second) == 2 / 5
    assert statistics.agreement(first, first) == 1


def test_predictions_of_other_images_are_refused() -> None:
    first = predictions(one_hot([0, 1]))
    other = Predictions(first.logits, first.labels, ("0", "7"))
    for function in (statistics.agreement, statistics.discordant, statistics.kl_divergence):
        with pytest.raises(ValueError, match="same images"):
            function(first, other)


def test_kl_divergence_equals_the_sum_written_out() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 6, 4)).astype(np.float32)
    soft = [np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True) for logits in (p, q)]
    brute = np.mean([sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(*soft, strict=True)])
    assert statistics.kl_divergence(predictions(p), predictions(q)) == pytest.approx(brute, rel=1e-9)
    # A constant added to all logits of an image changes no probability.
    assert statistics.kl_divergence(predictions(p), predictions(p + 3)) == pytest.approx(0, abs=1e-6)
    assert statistics.kl_divergence(predictions(p), predictions(p)) == 0


def test_kl_divergence_is_finite_for_extreme_logits() -> None:
    sure = np.array([[2000.0, 0, 0, 0]])
    assert statistics.kl_divergence(predictions(sure), predictions(sure[:, ::-1])) == pytest.approx(2000)


def test_sqnr_of_a_tenth_of_noise_is_twenty_decibels() -> None:
    signal = np.random.default_rng(0).normal(size=(50, 10)).astype(np.float32)
    assert statistics.sqnr(signal, signal * 1.1) == pytest.approx(20, abs=1e-4)
    assert statistics.sqnr(signal, signal * 0.99) == pytest.approx(40, abs=1e-3)
    assert statistics.sqnr(signal, signal) == math.inf
    with pytest.raises(ValueError, match="shapes differ"):
        statistics.sqnr(signal, signal[:1])


# ---- Verdicts


@pytest.mark.parametrize(
    ("first_only", "second_only", "n", "margin", "words"),
    [
        (60, 47, 10_000, 0.005, "no loss beyond 0.5 points"),  # -0.13 [-0.34, +0.07]
        (80, 45, 10_000, 0.01, "no loss beyond 1 points"),  # a loss is shown, and that it is within the margin
        (400, 50, 10_000, 0.005, "loss"),
        (60, 20, 10_000, 0.005, "loss"),  # -0.4 [-0.59, -0.23]
        (0, 0, 899, 0.02, "no loss beyond 2 points"),
        (0, 40, 744, 0.005, "no loss beyond 0.5 points"),
    ],
)
def test_verdicts(first_only: int, second_only: int, n: int, margin: float, words: str) -> None:
    assert sentences.verdict(statistics.verdict(first_only, second_only, n, margin)) == words


def test_a_verdict_that_cannot_be_given_says_how_many_images_would_do() -> None:
    some, few = statistics.verdict(200, 170, 10_000, 0.005), statistics.verdict(0, 0, 100, 0.005)
    assert some == Verdict(VerdictKind.undecided, 0.005, 10_000, 17_000)
    assert few == Verdict(VerdictKind.undecided, 0.005, 100, 3400)
    assert sentences.verdict(some) == "can't tell with 10,000 images; 17,000 would do"
    assert statistics.images_needed(1, 0, 1, 0.005) > 1


@pytest.mark.parametrize(("b", "c", "n", "margin"), [(20, 17, 1000, 0.005), (9, 5, 744, 0.005), (5, 1, 300, 0.02)])
def test_the_images_that_would_do_give_a_verdict_in_about_four_cases_of_five(
    b: int, c: int, n: int, margin: float
) -> None:
    assert statistics.verdict(b, c, n, margin).kind is VerdictKind.undecided
    needed = statistics.images_needed(b, c, n, margin)
    tables = np.random.default_rng(0).multinomial(needed, [b / n, c / n, 1 - (b + c) / n], 4000)
    low, high = statistics.tango_bounds(tables[:, 0], tables[:, 1], needed)
    assert 0.76 < np.mean((low > -margin) | (high < 0)) < 0.90


@pytest.mark.parametrize(("b", "c", "n"), [(60, 47, 10_000), (12, 9, 899), (30, 30, 744)])
def test_the_detectable_difference_is_found_in_about_four_cases_of_five(b: int, c: int, n: int) -> None:
    difference, share = statistics.detectable(b, c, n), (b + c) / n
    chances = [(share + difference) / 2, (share - difference) / 2, 1 - share]
    tables = np.random.default_rng(0).multinomial(n, chances, 4000)
    low, high = statistics.tango_bounds(tables[:, 0], tables[:, 1], n)
    assert 0.76 < np.mean((low > 0) | (high < 0)) < 0.86


def test_the_detectable_difference_shrinks_with_images_and_is_not_zero_without_disagreement() -> None:
    found = [statistics.detectable(0, 0, n) for n in (2, 100, 899, 10_000)]
    assert found[0] == 1
    assert found == sorted(found, reverse=True)
    # Without a disagreement: d n is about (z_alpha + z_beta)^2 = 7.85.
    assert found[-1] * 10_000 == pytest.approx(7.85, abs=0.02)
    assert statistics.detectable(0, 0, 0) == 1


# ---- Durations


def test_p99_is_given_from_a_thousand_calls_on() -> None:
    samples = np.arange(1, 1001, dtype=np.float32)
    full, short = statistics.summarise(samples), statistics.summarise(samples[:999])
    assert (full.p50, full.p90, full.p99) == pytest.approx((500.5, 900.1, 990.01))
    assert (full.calls, full.minimum, full.iqr) == (1000, 1, pytest.approx(499.5))
    assert short.p99 is None
    with pytest.raises(ValueError, match="no samples"):
        statistics.summarise(samples[:0])


def test_the_median_ratio_is_the_median_of_all_pairs_and_its_interval_repeats() -> None:
    ratios = [np.array([1.9, 2.0, 2.2]), np.array([2.1, 2.4])]
    interval = statistics.median_ratio(ratios)
    assert interval.value == 2.1
    assert interval.low <= 2.1 <= interval.high
    assert interval == statistics.median_ratio(ratios)
    assert interval.method == "bootstrap of blocks within 2 workers"
    assert statistics.median_ratio(ratios[:1]).method == "bootstrap of blocks within 1 worker"


def test_the_bootstrap_of_one_worker_equals_the_exact_distribution_of_resampled_medians() -> None:
    # Of 3 pairs the resampled median is the lowest with probability 7/27, the middle 13/27, the highest 7/27, so the
    # interval at 40% (30th to 70th percentile) is the middle one alone, and at 60% (20th to 80th) all three.
    pairs = [np.array([1.0, 2.0, 3.0])]
    narrow, wide = statistics.median_ratio(pairs, 0.40), statistics.median_ratio(pairs, 0.60)
    assert (narrow.low, narrow.high) == (2, 2)
    assert (wide.low, wide.high) == (1, 3)


def test_workers_of_different_lengths_give_as_many_blocks_as_they_have() -> None:
    # 9 of 10 pairs are from the first worker, so its value is the median of every resample.
    interval = statistics.median_ratio([np.full(9, 2.0), np.array([5.0])])
    assert (interval.low, interval.value, interval.high) == (2, 2, 2)


def test_from_five_workers_on_workers_are_resampled() -> None:
    # Workers that each repeat one number exactly: blocks within workers say nothing, workers say everything.
    workers = [np.full(20, value) for value in (1.8, 1.9, 2.0, 2.1, 2.2)]
    of_workers, of_blocks = statistics.median_ratio(workers), statistics.median_ratio(workers[1:])
    assert of_workers.method == "bootstrap of workers, then blocks"
    assert (of_workers.low, of_workers.high) == pytest.approx((1.8, 2.2))
    assert "4 workers" in of_blocks.method
    assert of_blocks.low == pytest.approx(of_blocks.high)


@pytest.mark.slow
def test_the_bootstrap_of_workers_covers_where_workers_differ() -> None:
    rng = np.random.default_rng(0)
    covered = {"workers": 0, "blocks": 0}
    for _ in range(200):
        workers = [2 * np.exp(rng.normal(0, 0.03) + rng.normal(0, 0.01, 40)) for _ in range(8)]
        for name, groups in (("workers", workers), ("blocks", [np.concatenate(workers)])):
            interval = statistics.median_ratio(groups, resamples=400)
            covered[name] += interval.low <= 2 <= interval.high
    # What the hierarchy is for: pooled blocks would claim far too much.
    assert covered["workers"] >= 170
    assert covered["blocks"] < 130


# ---- Means and spreads of several runs


def test_a_means_interval_is_that_of_students_t() -> None:
    values = [0.04, 0.01, 0.02, 0.06]
    interval = statistics.mean_interval(values)
    expected = distributions.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.0325, expected.low, expected.high))


def test_a_standard_deviations_interval_is_that_of_chi_square() -> None:
    # R: sqrt(2 / qchisq(c(0.975, 0.025), 2))
    interval = statistics.spread_interval(1.0, 2)
    assert (interval.value, interval.low, interval.high) == pytest.approx((1, 0.5206, 6.2847), abs=1e-4)
    interval = statistics.spread_interval(3.0, 14)
    assert (interval.low, interval.high) == pytest.approx(
        [3 * math.sqrt(14 / distributions.chi2.ppf(p, 14)) for p in (0.975, 0.025)]
    )


def test_the_pooled_spread_is_the_residual_of_an_analysis_of_variance() -> None:
    samples = [(1.0, 2.0, 4.0), (7.0,), (3.0, 3.5)]
    residual = sum(float(np.var(sample) * len(sample)) for sample in samples)
    assert statistics.pooled_spread(samples) == pytest.approx((math.sqrt(residual / 3), 3))
    assert statistics.pooled_spread([(1.0,), (2.0,)]) == (0.0, 0)


# ---- From which size on


def samples_of(
    rng: np.random.Generator, means: Sequence[float], spreads: float | Sequence[float], draws: int = 3
) -> list[list[float]]:
    return rng.normal(means, spreads, (draws, len(means))).T.tolist()


def test_of_two_equally_spread_sizes_the_larger_wins_exactly_where_students_one_sided_test_says_so() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        a = rng.normal(0, 1, 3)
        b = rng.normal(1.5, 1) + a
        found = statistics.plateau([a.tolist(), b.tolist()])
        assert found is not None
        assert (found.index == 1) == (distributions.ttest_ind(b, a, alternative="greater").pvalue < 0.025)
        interval = distributions.ttest_ind(b, a).confidence_interval(0.95)
        assert (found.gains[0].low, found.gains[0].high) == pytest.approx((interval.low, interval.high))
        seen.add(found.index)
    assert seen == {0, 1}


def by_brute_force(samples: Sequence[np.ndarray]) -> int:
    """The smallest size without a larger one that beats it by more than t standard errors, all written out."""
    for index in range(len(samples) - 1):
        compared = samples[index:]
        n = sum(map(len, compared))
        variance = sum(((s - s.mean()) ** 2).sum() for s in compared) / (n - len(compared))
        t = distributions.t.isf(0.025 / (len(compared) - 1), n - len(compared))
        own = compared[0]
        at_own = max(variance, own.var(ddof=1)) / len(own)
        if all(s.mean() - own.mean() <= t * np.sqrt(at_own + variance / len(s)) for s in compared[1:]):
            return index
    return len(samples) - 1


def test_the_plateau_is_that_of_the_rule_written_out() -> None:
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(200):
        samples = [rng.normal(mean, 0.5, draws) for mean, draws in ((-3, 3), (-1, 4), (0, 2), (0.5, 3))]
        found = statistics.plateau([sample.tolist() for sample in samples])
        assert found is not None
        assert found.index == by_brute_force(samples)
        seen.add(found.index)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("spreads", "exact", "most"),
    [
        ([1.0] * 7, False, 0.015),
        ([1.0] * 6 + [0.0], True, 0.015),
        ([0.5**n for n in range(7)], False, 0.05),
    ],
)
def test_a_rise_is_seen_where_there_is_none_as_rarely_as_said(spreads: list[float], exact: bool, most: float) -> None:
    rng = np.random.default_rng(2)
    trials, wrong, covered = 10_000, 0, 0
    for _ in range(trials):
        samples = samples_of(rng, [0] * 7, spreads)
        if exact:
            samples[-1] = [0.0]
        found = statistics.plateau(samples, exact)
        assert found is not None
        wrong += found.index > 0
        covered += found.index > 0 or max(gain.high for gain in found.gains) >= 0
    sampling = 3 * math.sqrt(most * (1 - most) / trials)
    assert wrong / trials <= most + sampling
    assert covered / trials >= 0.975 - sampling


def test_a_size_without_error_narrows_the_gain_over_it() -> None:
    samples = [(0.0, 1.0, 2.0), (3.0,)]
    sampled, exact = statistics.plateau(samples), statistics.plateau(samples, exact=True)
    assert sampled is not None
    assert exact is not None
    # s = 1 with 2 degrees of freedom; the mean of three has a variance of 1/3, a single value one of 1, or of 0.
    t = distributions.t.isf(0.025, 2)
    assert sampled.gains[0].high == pytest.approx(2 + t * math.sqrt(1 / 3 + 1))
    assert exact.gains[0].high == pytest.approx(2 + t * math.sqrt(1 / 3))


def test_where_the_sizes_compared_have_no_spread_that_of_all_counts() -> None:
    found = statistics.plateau([(0.0, 0.1), (5.0, 5.0), (5.0, 5.0)])
    assert found is not None
    assert (found.index, found.spread) == (1, pytest.approx(math.sqrt(0.005 / 3)))


@pytest.mark.parametrize("means", [(-1.0, 0.0), (-3.0, -1.0, 0.0), (-3.0, -1.0, 0.0, 0.0)])
def test_a_size_is_called_enough_that_is_not_as_rarely_as_said(means: tuple[float, ...]) -> None:
    rng = np.random.default_rng(4)
    trials, margin, first = 4000, 1.0, means.index(0)
    found = [statistics.enough(samples_of(rng, means, 0.5), margin) for _ in range(trials)]
    sampling = 3 * math.sqrt(0.025 * 0.975 / trials)
    assert np.mean([index is not None and index < first for index in found]) <= 0.025 + sampling
    assert all(statistics.enough(samples_of(rng, [0] * 4, 0.1), margin) == 0 for _ in range(50))
    assert statistics.enough([(0.1,), (0.2,)], 0.5) is None


def test_a_rise_is_seen_where_there_is_one() -> None:
    rng = np.random.default_rng(3)
    found = [statistics.plateau(samples_of(rng, (-3, -2, 0, 0, 0), 0.3)) for _ in range(300)]
    indices = [plateau.index for plateau in found if plateau]
    assert np.mean([index == 2 for index in indices]) > 0.9
    assert np.mean([index > 2 for index in indices]) <= 0.05  # called too small although it is enough


def test_without_draws_sizes_cant_be_told_apart() -> None:
    assert statistics.plateau([(0.1,), (0.2,)]) is None
    assert statistics.plateau([(0.1, 0.1), (0.2, 0.2)]) is None
    assert statistics.plateau([(0.1, 0.2)]) is None
