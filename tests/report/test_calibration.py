"""Calibration samples, sizes and winners, as numbers; test_readings.py has them in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scipy import stats

from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.report import calibration
from qexp.report.study import Study, studies
from tests.helpers.rows import RISING, by_size, row

# ---- Draws


def drawn(qconfig: str, accuracies: Sequence[float]) -> list[RunRecord]:
    return [row(f"{qconfig} {n}", value, qconfig=qconfig, calib__seed=str(n)) for n, value in enumerate(accuracies)]


TENSOR, CHANNEL = drawn("per_tensor", (0.85, 0.86, 0.84)), drawn("per_channel", (0.88, 0.881))


def test_samples_are_runs_that_differ_in_their_seed_alone() -> None:
    tensor, channel = calibration.samples([*TENSOR, *CHANNEL])
    assert (tensor.settings, tensor.accuracies) == ({"qconfig": "per_tensor"}, (0.85, 0.86, 0.84))
    assert (channel.settings, channel.accuracies) == ({"qconfig": "per_channel"}, (0.88, 0.881))
    assert tensor.sampling == pytest.approx(0.0022)
    assert calibration.samples(TENSOR)[0].settings == {}  # nothing else varied


def test_samples_need_two_seeds_and_nothing_else_that_differs() -> None:
    assert calibration.samples(TENSOR[:1]) == []
    assert calibration.samples([TENSOR[0], CHANNEL[1]]) == []  # another seed, but of another setting
    assert calibration.samples([TENSOR[0], replace(TENSOR[1], status="FAILED")]) == []
    assert len(calibration.samples([TENSOR[0], TENSOR[0], TENSOR[1]])[0].accuracies) == 2  # twice one seed
    without = [replace(r, params={**r.params, "calib.seed": "n/a"}) for r in TENSOR]
    assert calibration.samples(without) == []


def test_what_was_resolved_makes_no_setting_of_its_own() -> None:
    other = replace(TENSOR[1], params={**TENSOR[1].params, "resolved.weight_bits": "7"})
    assert len(calibration.samples([TENSOR[0], other])) == 1


def test_the_two_kinds_of_chance_are_apart_and_both_standard_deviations() -> None:
    groups = calibration.samples([*TENSOR, *CHANNEL])
    found = calibration.spreads(groups)
    # 2 degrees of freedom with a variance of 0.01^2, and one with 0.001^2 / 2.
    assert found.samples.value == pytest.approx(math.sqrt((2 * 0.01**2 + 0.001**2 / 2) / 3))
    assert found.images == pytest.approx(0.0022 / stats.norm.isf(0.025))
    assert found.can_tell  # 0.82 points [0.46, 3.05] against 0.11
    for sampling, can_tell in ((0.5, True), (0.01, False), (0.02, False), (1e-5, True)):
        other = calibration.spreads([replace(group, sampling=sampling) for group in groups])
        assert (other.samples, other.can_tell) == (found.samples, can_tell)


# ---- Calibration sizes


def test_sizes_are_in_order_and_all_images_have_no_sample() -> None:
    (found,) = calibration.sizes(by_size(RISING))
    assert [(size.batches, size.images, size.exact) for size in found.sizes] == [
        (1, 16, False),
        (8, 128, False),
        (32, 512, False),
        (None, 898, True),
    ]
    assert [size.accuracies for size in found.sizes] == [RISING[batches] for batches in ("1", "8", "32", "null")]
    assert found.plateau is not None
    assert (found.plateau.index, found.enough, found.settings) == (1, 1, {})
    assert found.sampling == pytest.approx(0.0022)


def test_all_images_in_an_order_that_matters_have_samples() -> None:
    rows = by_size({"8": (0.80, 0.81), "null": (0.82, 0.83)})
    rows = [replace(r, params={**r.params, "calib.seed": r.name.split()[1]}) for r in rows]
    (found,) = calibration.sizes(rows)
    assert (found.sizes[1].accuracies, found.sizes[1].exact) == ((0.82, 0.83), False)


def test_a_size_may_be_enough_only_since_all_images_have_no_spread() -> None:
    # The largest gain at 95% is t(2 degrees of freedom) * 0.05 points * sqrt(1/3): 0.12; with a spread of all, 0.25.
    (found,) = calibration.sizes(by_size({"8": (0.80, 0.8005, 0.801), "null": (0.8005,)}))
    assert found.plateau is not None
    assert (found.plateau.gains[0].high, found.enough) == (pytest.approx(0.00124, abs=1e-5), 0)


def test_the_order_of_sizes_does_not_matter_and_a_seed_counts_once() -> None:
    rows = by_size(RISING)
    by_seed = sorted(rows, key=lambda r: (r.params["calib.seed"], -r.metrics[Metric.calibration_images]))
    assert calibration.sizes([*by_seed, *rows]) == calibration.sizes(rows)


def test_sizes_are_read_for_each_combination_of_the_other_settings() -> None:
    rows = [*by_size(RISING, qconfig="per_tensor"), *by_size(RISING, qconfig="per_channel")]
    found = calibration.sizes(rows)
    assert [one.settings for one in found] == [{"qconfig": "per_tensor"}, {"qconfig": "per_channel"}]
    assert found[0].sizes == found[1].sizes


def test_all_images_go_with_each_way_of_sampling() -> None:
    rows = by_size(RISING)
    stratified = [
        replace(r, params={**r.params, "calib.sampling": "stratified"}) for r in rows if r.params["calib.seed"] != "n/a"
    ]
    found = calibration.sizes([*rows, *stratified])
    assert [one.settings["calib.sampling"] for one in found] == ["random", "stratified"]
    assert [one.sizes for one in found] == [calibration.sizes(rows)[0].sizes] * 2


def test_one_size_is_no_sweep_over_sizes() -> None:
    assert calibration.sizes(by_size({"8": (0.80, 0.81)})) == []
    assert calibration.sizes(TENSOR) == []
    assert calibration.sizes([]) == []


# ---- Winners


def seeds(accuracies: dict[str, Sequence[float]]) -> Study:
    """A study of observers with one accuracy for each calib.seed; a single one holds for every seed."""
    return studies(
        [
            row(f"{observer} {seed}", value, observer=observer, calib__seed=str(seed) if len(values) > 1 else "n/a")
            for observer, values in accuracies.items()
            for seed, value in enumerate(values)
        ]
    )[0]


def test_the_winner_is_the_most_accurate_setting_of_each_seed() -> None:
    found = calibration.winners(seeds({"minmax": (0.85, 0.87, 0.86), "mse": (0.86, 0.85, 0.86), "entropy": (0.84,)}))
    assert found is not None
    mse, minmax = {"observer": "mse"}, {"observer": "minmax"}
    assert (found.settings, found.winners) == (3, {"0": (mse,), "1": (minmax,), "2": (minmax, mse)})
    # A tie is no change.
    assert (found.pairs, found.changes) == (3, 1)


def test_a_winner_needs_two_settings_with_two_seeds() -> None:
    assert calibration.winners(seeds({"minmax": (0.85, 0.87)})) is None
    assert calibration.winners(seeds({"minmax": (0.85,), "mse": (0.86,)})) is None
    found = calibration.winners(seeds({"minmax": (0.85, 0.87), "mse": (0.86, 0.88, 0.89), "entropy": (0.9, 0.9, 0.9)}))
    # That of seed 2 has no minmax.
    assert found is not None
    assert (found.settings, list(found.winners)) == (2, ["0", "1", "2"])
