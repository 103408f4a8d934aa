"""Racing in a run: what is stopped and with which figures, against runs that are evaluated on all images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qexp import statistics
from qexp.config.schema import Config
from qexp.metrics import Metric
from qexp.pipeline import race
from qexp.pipeline.run import run_experiment
from qexp.records import RACING_TAG, Interval, Result, Stopped
from qexp.report.racing import Evaluated, block_ends
from qexp.report.study import Latency

Composed = Callable[..., Config]
Run = Callable[..., Result | Stopped]


@pytest.fixture
def run(composed: Composed, checkpoint: Path, tmp_path: Path) -> Run:
    """run(name, *overrides) -> the outcome of a job of a sweep, whose folder is tmp_path/name."""

    def job(name: str, *overrides: str) -> Result | Stopped:
        config = composed("model=tiny", "latency=off", "dataset.margin=0.03", "runtimes=[eager,torchscript]",
            f"model.checkpoint={checkpoint}", "tracking.parent=sweep", "cache.enabled=false", *overrides)  # fmt: skip
        (tmp_path / name).mkdir()
        return run_experiment(config, tmp_path / name)

    return job


def differences(folder: Path) -> np.ndarray:
    """int8 [images]: INT8 right minus FP32 right in a whole run, in the order of the race."""
    kept = np.load(folder / "predictions.npz")
    fp32, int8 = ((kept[name].argmax(1) == kept["labels"]).astype(np.int8) for name in ("fp32", "int8"))
    return (int8 - fp32)[statistics.random_order(len(fp32))]


def test_a_bad_setting_is_stopped_with_what_all_images_show_of_those_it_saw(run: Run, tmp_path: Path) -> None:
    bits = "qconfig.weight.bits=2"
    whole = run("whole", bits)
    stopped = run("stopped", bits, "racing=true")
    assert isinstance(whole, Result)
    assert isinstance(stopped, Stopped)
    assert not (tmp_path / "outputs" / "racing").exists()  # it is nobody's rival
    images, seen = (int(stopped.metrics[name]) for name in (Metric.race_all_images, Metric.race_images))
    assert images == whole.metrics[Metric.images]
    assert seen in block_ends(images, 32)[:-1]
    first = differences(tmp_path / "whole")[:seen]
    for runtime in ("eager", "torchscript"):
        assert stopped.metrics[Metric.race_fp32_only.of(runtime)] == np.sum(first < 0)
        assert stopped.metrics[Metric.race_int8_only.of(runtime)] == np.sum(first > 0)
    assert set(stopped.metrics) == {name for name in stopped.metrics if name.startswith("racing/")}
    assert stopped.tags[RACING_TAG] == stopped.reason == "futility"
    # All that says whether it has to be repeated, and which study it is of.
    same = {"code_hash", "config_hash", "checkpoint_digest", "data_digest", "calib_digest", "kernel_signature", "cpu"}
    assert {name: stopped.tags[name] for name in same} == {name: whole.tags[name] for name in same}
    assert stopped.tags["float_digest"] == whole.tags["float_digest"]
    assert stopped.resolved.items() <= whole.resolved.items()


def test_a_good_setting_has_the_logits_that_it_has_without_racing_and_is_a_rival(run: Run, tmp_path: Path) -> None:
    assert isinstance(run("plain"), Result)
    assert isinstance(run("raced", "racing=true"), Result)
    plain, raced = (np.load(tmp_path / name / "predictions.npz") for name in ("plain", "raced"))
    assert np.array_equal(plain["int8"], raced["int8"])
    assert np.array_equal(plain["fp32"], raced["fp32"])
    (left,) = (tmp_path / "outputs" / "racing" / "sweep").glob("*/*.npz")
    (rival,) = race.Race(left.parent, "another").others()
    assert np.array_equal(rival.differences, differences(tmp_path / "plain"))
    assert rival.latency is None  # it was not timed
    assert race.Race(left.parent, left.stem).others() == []  # nobody is his own


def speed(ratio: float) -> Latency:
    interval = Interval(ratio, ratio * math.exp(-0.02), ratio * math.exp(0.02), 0.95, "")
    return Latency("eager", 1, 1, 1.0, 1.0, interval)


def test_one_that_is_dominated_is_stopped_where_its_timing_is_known(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Evaluated(np.ones(899, dtype=np.int8), speed(3.0))
    folder = tmp_path / "rivals"
    race.Race(folder, "good").leave([good])
    monkeypatch.setattr(race, "race_of", lambda *_: race.Race(folder, "mine"))
    monkeypatch.setattr("qexp.pipeline.run.race_of", lambda *_: race.Race(folder, "mine"))
    assert isinstance(run("untimed", "racing=true"), Result)
    monkeypatch.setattr(race, "known_latencies", lambda *_: {"eager": speed(2.0), "torchscript": speed(4.0)})
    assert isinstance(run("faster", "racing=true"), Result)  # in one of the runtimes that agree
    monkeypatch.setattr(race, "known_latencies", lambda *_: {"eager": speed(2.0)})
    stopped = run("slower", "racing=true")
    assert isinstance(stopped, Stopped)
    assert stopped.reason == "domination"


def test_what_is_left_is_read_as_it_was(tmp_path: Path) -> None:
    candidates = [Evaluated(np.array([0, -1, 1], dtype=np.int8), None),
                  Evaluated(np.array([1, 0, 0], dtype=np.int8), speed(2.5))]  # fmt: skip
    race.Race(tmp_path / "sweep", "one").leave(candidates)
    found = race.Race(tmp_path / "sweep", "other").others()
    for one, other in zip(candidates, found, strict=True):
        assert np.array_equal(one.differences, other.differences)
        assert other.differences.dtype == np.int8
    assert found[0].latency is None
    assert found[1].latency is not None
    assert found[1].latency.speedup.value == 2.5
    assert dataclasses.astuple(found[1].latency.speedup)[1:3] == dataclasses.astuple(speed(2.5).speedup)[1:3]
