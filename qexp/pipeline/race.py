"""Racing: evaluation by blocks of images, after each of which a run of a sweep may find that it need not go on.

The runs of a sweep have a folder. Each that was evaluated on all images leaves there what it has right on which image,
and its timings; each that is being evaluated reads what the others have left, under any launcher and whether the sweep
is new or resumed. With what a run finds it decides for itself, by `report.racing`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qexp import quantize, statistics
from qexp.config import identity
from qexp.config.schema import Config
from qexp.data.loading import Data
from qexp.latency import protocol, shared_timings
from qexp.metrics import Metric
from qexp.pipeline import run_metrics
from qexp.pipeline.evaluate import Evaluation
from qexp.pipeline.prepare import Saved
from qexp.records import (
    RACED_FOR_TAG,
    RACING_TAG,
    SAME_TAG,
    Interval,
    Precision,
    Predictions,
    Stopped,
    Variant,
    same_as_text,
)
from qexp.report import racing
from qexp.report.racing import Evaluated, Reason
from qexp.report.study import Latency
from qexp.system import cache
from qexp.system.steps import step


@dataclass(frozen=True)
class Race:
    """The race that a run takes part in. folder: of the runs that it is compared with; name: of its own file."""

    folder: Path
    name: str
    _read: dict[str, list[Evaluated]] = field(default_factory=dict)

    def others(self) -> list[Evaluated]:
        """The candidates of all other runs that were evaluated on all images so far."""
        for path in sorted(self.folder.glob("*.npz")):
            if path.stem != self.name and path.stem not in self._read:
                self._read[path.stem] = _candidates(path)
        return [one for candidates in self._read.values() for one in candidates]

    def leave(self, candidates: Sequence[Evaluated]) -> None:
        """Write the candidates of this run, which was evaluated on all images, for the others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        speeds = [_numbers(one.latency) for one in candidates]
        temporary = self.folder / f"{self.name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            np.savez_compressed(file, differences=[one.differences for one in candidates], speedups=speeds)
        temporary.replace(self.folder / f"{self.name}.npz")


def _candidates(path: Path) -> list[Evaluated]:
    with np.load(path, allow_pickle=False) as arrays:
        return [Evaluated(*pair) for pair in zip(arrays["differences"], map(_latency, arrays["speedups"]), strict=True)]


def _numbers(latency: Latency | None) -> list[float]:
    speedup = latency.speedup if latency else Interval(np.nan, np.nan, np.nan, 0.95, "")
    return [speedup.value, speedup.low, speedup.high]


def _latency(numbers: np.ndarray) -> Latency | None:
    """The timing that `_numbers` has read, as far as a race needs it."""
    value, low, high = map(float, numbers)
    return None if np.isnan(value) else Latency("", 0, 0, np.nan, np.nan, Interval(value, low, high, 0.95, ""))


def race_of(config: Config, data: Data, float_digest: str, provenance: Mapping[str, str]) -> Race | None:
    """The race of the sweep's runs with the same float model, images, code, CPU and kernels; None without `racing`.

    provenance: tags (see `run_files.tags`).
    """
    parent = config.tracking.parent
    if not config.racing or parent is None:
        return None
    where = [provenance[name] for name in ("cpu", "kernel_signature", "torch", "code_hash")]
    alike = cache.hash_of([float_digest, data.test.digest, where])[:16]
    return Race(Path(config.outputs) / "racing" / parent / alike, identity.config_hash(config))


@dataclass(frozen=True)
class Raced:
    """The outcome of a race for a run. logits: those that it computed on all images, float32 [N, classes]; reason: of
    its stop, None where it was not stopped; metrics, tags: what a stopped run has seen."""

    logits: Mapping[Variant, np.ndarray] = field(default_factory=dict)
    reason: Reason | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def stopped(self, config: Config, resolved: dict[str, str], tags: Mapping[str, str]) -> Stopped:
        """The outcome of a stopped run. resolved: params of what was executed; tags: of what it holds for."""
        assert self.reason is not None
        of_race = {RACING_TAG: str(self.reason), RACED_FOR_TAG: identity.raced_for(config)}
        return Stopped(str(self.reason), dict(self.metrics), resolved, {**tags, **self.tags, **of_race})


@step("evaluate")
def run_race(config: Config, data: Data, saved: Saved, race: Race | None) -> Raced:
    """Evaluate all candidates block by block, until none of them need go on or all images are seen.

    Where all logits are cached there is nothing to save, and nothing is stopped.
    """
    if race is None:
        return Raced()
    evaluation, groups = Evaluation(config, data, saved), _groups(config, saved)
    at_hand = {one: evaluation.at_hand(one) for one in groups}
    if all(logits is not None for logits in at_hand.values()):
        return Raced()
    reference = saved.reference_variant(Precision.fp32)
    labels, order, size = data.test.labels, statistics.random_order(len(data.test)), config.evaluate.batch_size
    latencies, margin = known_latencies(config, saved), config.report.margin or config.dataset["margin"]
    with quantize.engine(config.engine):
        is_cached = evaluation.at_hand(reference) is not None
        fp32 = evaluation.logits(reference)
        computed = {} if is_cached else {reference: fp32}
        fp32_right = fp32.argmax(axis=1) == labels
        models = {one: saved.variants[saved.quickest(one)] for one in groups}
        copies = {one: evaluation.copies(saved.quickest(one)) for one in groups if at_hand[one] is None}
        logits = {one: np.empty_like(fp32) for one in groups}
        start = 0
        for end in racing.block_ends(len(order), size):
            block, seen = order[start:end], order[:end]
            for one in groups:
                cached = at_hand[one]
                logits[one][block] = (
                    evaluation.run(models[one], one.precision, block, copies[one]) if cached is None else cached[block]
                )
            so_far = [
                Evaluated(
                    _differences(logits[one][seen], labels[seen], fp32_right[seen]), _fastest(latencies, runtimes)
                )
                for one, runtimes in groups.items()
            ]
            others = race.others()
            reasons = [racing.reason_to_stop(one, others, len(order), margin) for one in so_far]
            if all(reasons):
                return Raced({}, reasons[0], *_seen(list(groups.values()), so_far, len(order)))
            start = end
    return Raced(computed | {one: logits[one] for one in groups if at_hand[one] is None})


def _groups(config: Config, saved: Saved) -> dict[Variant, tuple[str, ...]]:
    """The candidates: of the INT8 variants that return the same logits the first, and the runtimes of all of them. With
    `report.runtime` only that which it is in."""
    groups: dict[Variant, tuple[str, ...]] = {}
    for variant in saved.of(Precision.int8):
        if not any(variant.runtime in runtimes for runtimes in groups.values()):
            groups[variant] = tuple(one.runtime for one in saved.same(variant))
    asked = {one: runtimes for one, runtimes in groups.items() if config.report.runtime in runtimes}
    return asked or groups


def _differences(logits: np.ndarray, labels: np.ndarray, fp32_right: np.ndarray) -> np.ndarray:
    """int8 [n]: INT8 right minus FP32 right."""
    right = logits.argmax(axis=1) == labels
    return right.astype(np.int8) - fp32_right.astype(np.int8)


def _seen(
    groups: Sequence[tuple[str, ...]], so_far: Sequence[Evaluated], images: int
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics and tags of what a stopped run has seen."""
    counts: dict[str, float] = {
        Metric.race_images: float(len(so_far[0].differences)), Metric.race_all_images: float(images)
    }  # fmt: skip
    for runtimes, one in zip(groups, so_far, strict=True):
        for runtime in runtimes:
            counts[Metric.race_fp32_only.of(runtime)] = float(np.sum(one.differences < 0))
            counts[Metric.race_int8_only.of(runtime)] = float(np.sum(one.differences > 0))
    return counts, {SAME_TAG: same_as_text(groups)}


def known_latencies(config: Config, saved: Saved) -> dict[str, Latency]:
    """The timings that other runs have made of what this one executes, by INT8 runtime; empty where there are none."""
    shared = shared_timings.known(config, saved.timing_key) if saved.timing_key else None
    return latencies(config, shared[0]) if shared else {}


def latencies(config: Config, timings: Sequence[protocol.Timing]) -> dict[str, Latency]:
    """The timings by INT8 runtime that the sweep's report will go by, as far as they can be trusted."""
    asked = {
        conditions: reasons
        for conditions, reasons in run_metrics.reasons_by_conditions(config, list(timings)).items()
        if config.report.batch_size in (None, conditions[0]) and config.report.threads in (None, conditions[1])
    }
    if not asked:
        return {}
    where, reasons = next(iter(asked.items()))
    here = [one for one in timings if (one.batch_size, one.threads) == where and not one.control]
    fp32 = run_metrics.fastest(here, Precision.fp32)
    return {
        one.variant.runtime: Latency(
            one.variant.runtime, *where, one.summary.p50, fp32.summary.p50, protocol.speedup(fp32, one)
        )
        for one in here
        if one.variant.precision is Precision.int8 and not reasons
    }


def _fastest(latencies: Mapping[str, Latency], runtimes: Sequence[str]) -> Latency | None:
    known = [latencies[runtime] for runtime in runtimes if runtime in latencies]
    return max(known, key=lambda one: one.speedup.value, default=None)


def finishers(
    config: Config,
    saved: Saved,
    predictions: Mapping[Variant, Predictions],
    timings: Sequence[protocol.Timing],
    parted: Sequence[str],
) -> list[Evaluated]:
    """The candidates of a run that was evaluated on all images. parted: the runtimes that compute another function, and
    are none."""
    fp32 = predictions[saved.reference_variant(Precision.fp32)]
    order, known = statistics.random_order(len(fp32.labels)), latencies(config, timings)
    return [
        Evaluated(
            _differences(predictions[one].logits, fp32.labels, fp32.correct)[order],
            _fastest(known, runtimes),
        )
        for one, runtimes in _groups(config, saved).items()
        if one.runtime not in parted
    ]
