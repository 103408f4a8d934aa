"""Candidates for shipping: settings in runtimes, each tested against the margin.

Runtimes that agree bit for bit are one candidate, and so are the runs of a setting that differ in the seed of
calibration: their loss per image is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qexp import statistics
from qexp.config import schema
from qexp.config.identity import NOT_APPLICABLE
from qexp.config.schema import ReportObjective
from qexp.errors import ConfigError
from qexp.metrics import Metric
from qexp.records import (
    PARTED_TAG,
    RACING_TAG,
    SAME_TAG,
    SIMULATED_TAG,
    AccuracySource,
    Interval,
    RunRecord,
    SaturationStatus,
    Top1,
    same_from_text,
)
from qexp.report.study import SEED, Conditions, Latency, Study, same_setting, value

# One-sided, as of a single run's verdict.
LEVEL = 0.025


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A candidate's runs, one a calibration seed, and its runtimes."""

    records: tuple[RunRecord, ...]
    runtimes: tuple[str, ...]

    @property
    def on_target(self) -> bool:
        """True where the accuracy that counts is `target/accuracy`, which is that of the headline's kernels."""
        record = self.records[0]
        elsewhere = record.tags.get("accuracy_source") in (AccuracySource.exact, AccuracySource.emulated)
        return elsewhere and value(record, "resolved.runtime") in self.runtimes


@dataclass(frozen=True, eq=False)
class Candidate:
    """A setting in a runtime, that could be shipped.

    setting: the study's settings that varied, by name; runtimes: INT8 runtimes that agree bit for bit; runtime: of
    these, the one recommended, which is the fastest; records: finished runs, one a calibration seed, the one to
    ship first. images: of the test, 0 where unknown; delta: INT8 minus FP32 accuracy, mean over the seeds, with its
    95% score interval, None where unknown; deltas: of each seed; p: one-sided, of a loss of the margin or more, 1
    where unknown; adjusted: p after Holm over all candidates, 1 where only the winner is tested; qualifies: shown
    to lose less than the margin; selection: the mean difference on the images set aside for choosing, None where
    there are none. latency: None where it was not timed; size_mb: None where that of this runtime isn't known.
    reasons: for which it can't be recommended whatever its accuracy, a clause each. partial: of a setting that
    racing stopped, the difference on the images seen, with its interval; delta is None then.
    """

    setting: Mapping[str, str]
    runtimes: tuple[str, ...]
    runtime: str
    records: tuple[RunRecord, ...]
    images: int
    delta: Interval | None
    deltas: tuple[float, ...]
    p: float
    adjusted: float
    qualifies: bool
    latency: Latency | None
    size_mb: float | None
    reasons: tuple[str, ...] = ()
    selection: float | None = None
    partial: Interval | None = None

    @property
    def hypothesis(self) -> Hypothesis:
        return Hypothesis(self.records, self.runtimes)

    @property
    def ships(self) -> RunRecord:
        """The run to ship: that of the first calibration seed, so that none is chosen by its accuracy."""
        return self.records[0]

    @property
    def raced_out(self) -> bool:
        """True if racing stopped it."""
        return self.partial is not None

    @property
    def faster(self) -> bool:
        """True where the speedup's interval lies above 1 and can be trusted."""
        return self.latency is not None and self.latency.valid and self.latency.speedup.low > 1

    @property
    def seven_bit_layers(self) -> float:
        """The number of layers whose weights or activations have 7 bits, both sides counted, against saturation."""
        params, layers = self.ships.params, self.ships.metrics.get(Metric.layers_int8, 0.0)
        everywhere = (params.get("resolved.weight_bits") == "7") + (
            params.get("resolved.activation_highest_code") == "127"
        )
        return self.ships.metrics.get(Metric.layers_narrowed, 0.0) + everywhere * layers


def margin_of(study: Study, question: schema.Report) -> float:
    """The tolerated loss: the question's, else that of the data set as the runs have it. Raises ConfigError where
    neither is known."""
    if question.margin is not None:
        return question.margin
    known = [record.params["dataset.margin"] for record in study.records if "dataset.margin" in record.params]
    if not known:
        raise ConfigError("report.margin=null: the runs record no margin of their data set; give report.margin=0.005.")
    return float(known[0])


def select_share(study: Study) -> float:
    """The share of the evaluation images that was set aside for choosing the winner, 0 for none."""
    known = {value(record, "evaluate.select_share") for record in study.finished} - {NOT_APPLICABLE}
    return max((float(text) for text in known), default=0.0)


def conditions(study: Study, question: schema.Report) -> list[Conditions]:
    """The batch sizes and numbers of threads that were timed and are asked about, the first that was timed first."""
    return [
        (batch_size, threads)
        for batch_size, threads in study.conditions
        if question.batch_size in (None, batch_size) and question.threads in (None, threads)
    ]


def candidates(study: Study, question: schema.Report) -> list[Candidate]:
    """Every candidate of the study, tested against the margin and adjusted over all of them.

    With images set aside for choosing, figures are those on the rest, and `recommend` tests the winner alone.
    """
    share, margin = select_share(study), margin_of(study, question)
    where = next(iter(conditions(study, question)), None)
    found = _hypotheses(study, question)
    counts = [counts_of(study, one, share) for one in found]
    deltas, p = _tested(found, counts, margin)
    adjusted = np.ones(len(found)) if share else statistics.holm(p)
    result = []
    for one, count, delta, raw, corrected in zip(found, counts, deltas, p, adjusted, strict=True):
        ships = one.records[0]
        runtime, latency = _fastest(study, one, question, where)
        size = finite(ships, Metric.size_int8) if value(ships, "resolved.runtime") in one.runtimes else None
        unknown = count is None and (delta is None or delta.high >= -margin)
        result.append(
            Candidate(
                setting=study.setting(ships),
                runtimes=one.runtimes,
                runtime=runtime,
                records=one.records,
                images=int(count.sum()) if count is not None else images_of(one),
                delta=delta,
                deltas=tuple((c - b) / n for table in _tables(one) if table for b, c, n in [table] if n),
                p=float(raw),
                adjusted=float(corrected),
                qualifies=bool(corrected <= LEVEL),
                latency=latency,
                size_mb=size,
                partial=_partial(one),
                reasons=simulated(one)
                or (
                    *stopped(one),
                    *parted(one),
                    *_elsewhere(one),
                    *_untold(one, unknown),
                    *_unmeasured(size, latency, question),
                ),
                selection=_selection(study, one, share),
            )
        )
    return result


def _hypotheses(study: Study, question: schema.Report) -> list[Hypothesis]:
    settings: dict[frozenset[tuple[str, str]], list[RunRecord]] = {}
    for record in (*study.finished, *study.raced_out):
        settings.setdefault(same_setting(record), []).append(record)
    result = []
    for records in settings.values():
        seeds = _one_a_seed(study, records)
        groups = {record.run_id: _same(record) for record in seeds}
        alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for runtime in dict.fromkeys(name for each in groups.values() for group in each for name in group):
            signature = tuple(next((g for g in groups[one.run_id] if runtime in g), ()) for one in seeds)
            alike.setdefault(signature, []).append(runtime)
        for signature, runtimes in alike.items():
            if question.runtime in (None, *runtimes):
                having = tuple(record for record, group in zip(seeds, signature, strict=True) if group)
                result.append(Hypothesis(having, tuple(runtimes)))
    return result


def _one_a_seed(study: Study, records: Sequence[RunRecord]) -> list[RunRecord]:
    """One of a setting's runs for each calibration seed: of those not stopped by racing the first that has a valid
    timing, else the first; the lowest seed first."""
    seeds: dict[str, RunRecord] = {}

    def place(record: RunRecord) -> tuple[bool, bool]:
        return record.raced_out, not any(one.valid for one in study.latencies.get(record.run_id, ()))

    for record in sorted(records, key=place):
        seeds.setdefault(value(record, SEED), record)
    return [seeds[seed] for seed in sorted(seeds, key=lambda text: (int(text) if text.isdigit() else -1, text))]


def _same(record: RunRecord) -> tuple[tuple[str, ...], ...]:
    """The INT8 runtimes of a run in groups that agree bit for bit; each by itself where nothing is known."""
    known = same_from_text(record.tags.get(SAME_TAG, ""))
    alone = Metric.fp32_only.within(record.metrics) or {value(record, "resolved.runtime"): 0.0}
    return known or tuple((runtime,) for runtime in alone)


def early_end(record: RunRecord) -> str:
    """The end of a run that racing stopped, as a clause; empty for any other."""
    if not record.raced_out:
        return ""
    seen, images = (record.metrics.get(name, 0.0) for name in (Metric.race_images, Metric.race_all_images))
    return f"stopped by racing: after {seen:,.0f} of {images:,.0f} images ({record.tags[RACING_TAG]})"


def stopped(one: Hypothesis) -> tuple[str, ...]:
    """The reason, if there is one, that racing stopped one of its runs."""
    return tuple(filter(None, map(early_end, one.records)))[:1]


def _partial(one: Hypothesis) -> Interval | None:
    """The difference on the images that a stopped run has seen; None for others."""
    names = Metric.race_fp32_only.of(one.runtimes[0]), Metric.race_int8_only.of(one.runtimes[0]), Metric.race_images
    for record in one.records:
        b, c, n = (finite(record, name) for name in names)
        if record.raced_out and b is not None and c is not None and n:
            return statistics.tango(int(b), int(c), int(n))
    return None


def parted(one: Hypothesis) -> tuple[str, ...]:
    """The reason, if there is one, that a runtime computes another function than the model that was quantized."""
    names = {runtime for record in one.records for runtime in record.tags.get(PARTED_TAG, "").split()}
    return tuple(f"INT8 in {runtime} parts from torch's" for runtime in one.runtimes[:1] if runtime in names)


def simulated(one: Hypothesis) -> tuple[str, ...]:
    """The reason, if there is one, that no kernels execute it."""
    tags = one.records[0].tags
    return ("simulated in float, since no kernels hold its bits",) if tags.get(SIMULATED_TAG) == "true" else ()


def _elsewhere(one: Hypothesis) -> tuple[str, ...]:
    """The reason, if there is one, that its accuracy holds for another CPU than the target's."""
    record = one.records[0]
    target, tags = value(record, "target"), record.tags
    measured = f"the accuracy was not measured on the CPU that target={target} means"
    if tags.get("accuracy_source") in (AccuracySource.exact, AccuracySource.emulated):
        return () if one.on_target else (f"{measured} in {one.runtimes[0]}",)
    vnni = {"vnni": True, "avx2": False}.get(target)
    here = "vnni" in tags.get("isa", "")
    can_saturate = tags.get("saturation") in (SaturationStatus.possible, SaturationStatus.observed)
    return (measured,) if vnni is not None and vnni != here and can_saturate else ()


def _untold(one: Hypothesis, unknown: bool) -> tuple[str, ...]:
    if not unknown:
        return ()
    if not all(_tables(one)):
        return ("the runs don't record how many images changed",)
    return ("the predicted classes are not at hand",)


def _unmeasured(size_mb: float | None, latency: Latency | None, question: schema.Report) -> tuple[str, ...]:
    """The reason, if there is one, that what is asked for, size or speed, is not known."""
    if question.objective is ReportObjective.smallest:
        return () if size_mb is not None else ("the size in this runtime is not known",)
    if latency is not None:
        return () if latency.valid else (f"the timing can't be trusted: {latency.reasons[0]}",)
    asked = [f"report.{name}={value}" for name in ("batch_size", "threads") if (value := getattr(question, name))]
    return (" ".join(["there is no timing", *(["with", *asked] if asked else [])]),)


def _fastest(
    study: Study, one: Hypothesis, question: schema.Report, where: Conditions | None
) -> tuple[str, Latency | None]:
    """The fastest of its runtimes and the timing of it: of the run to ship, or of another seed's, which executes the
    same operators, where that can't be trusted."""
    timings = []
    for runtime in one.runtimes:
        if where and question.runtime in (None, runtime):
            found = [latency for record in one.records if (latency := study.latency(record, runtime, where))]
            timings += [next((latency for latency in found if latency.valid), found[0])] if found else []
    if not timings:
        return str(question.runtime or one.runtimes[0]), None
    best = max(timings, key=lambda latency: (latency.valid, latency.speedup.value))
    return best.runtime, best


def finite(record: RunRecord, name: str) -> float | None:
    found = record.metrics.get(name, math.nan)
    return found if math.isfinite(found) else None


def _tables(one: Hypothesis) -> list[tuple[int, int, int] | None]:
    """(fp32_only, int8_only, images) of each seed, None where a run doesn't have all three."""
    names = [Metric.fp32_only.of(one.runtimes[0]), Metric.int8_only.of(one.runtimes[0]), Metric.images]
    if one.on_target:
        names = [Metric.target_fp32_only, Metric.target_int8_only, Metric.target_images]
    result: list[tuple[int, int, int] | None] = []
    for record in one.records:
        b, c, n = (finite(record, name) for name in names)
        result.append(None if b is None or c is None or not n else (int(b), int(c), int(n)))
    return result


def images_of(one: Hypothesis) -> int:
    return max((table[2] for table in _tables(one) if table), default=0)


def sums_of(study: Study, one: Hypothesis) -> np.ndarray | None:
    """int64 [images]: of each image INT8 right minus FP32 right, added up over the seeds; None where a run's predicted
    classes are not at hand, or are of other images."""
    total: np.ndarray | None = None
    for record in one.records:
        difference = _difference(study.top1.get(record.run_id), one)
        if difference is None or (total is not None and len(total) != len(difference)):
            return None
        total = difference if total is None else total + difference
    return total


def _difference(found: Top1 | None, one: Hypothesis) -> np.ndarray | None:
    """int64 [images]: INT8 right minus FP32 right, on all images or on those of the target's accuracy."""
    int8 = None if found is None else found.target if one.on_target else found.int8.get(one.runtimes[0])
    if found is None or int8 is None:
        return None
    where = found.target_images if one.on_target else slice(None)
    labels = found.labels[where]
    return (int8 == labels).astype(np.int64) - (found.fp32[where] == labels)


def parts(images: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images for choosing, a fixed random share of them, and of the rest, for the test: int64."""
    order = np.random.default_rng(0).permutation(images)
    first = round(share * images)
    return order[:first], order[first:]


def counts_of(study: Study, one: Hypothesis, share: float) -> np.ndarray | None:
    """int64 [2 K + 1]: the test images whose sum over the K seeds is -K, ..., K; None where unknown."""
    tables = _tables(one)
    if not share and len(tables) == 1:
        if tables[0] is None:
            return None
        b, c, n = tables[0]
        return np.array([b, n - b - c, c])
    sums = sums_of(study, one)
    if sums is None:
        return None
    tested = parts(len(sums), share)[1] if share else slice(None)
    return np.bincount(sums[tested] + len(tables), minlength=2 * len(tables) + 1)


def _selection(study: Study, one: Hypothesis, share: float) -> float | None:
    sums = sums_of(study, one) if share else None
    return None if sums is None else float(sums[parts(len(sums), share)[0]].mean() / len(one.records))


def scale_of(seeds: int) -> np.ndarray:
    """float64 [2 K + 1]: the values that an image's mean difference over K seeds can have."""
    return np.arange(-seeds, seeds + 1) / seeds


def _tested(
    found: Sequence[Hypothesis], counts: Sequence[np.ndarray | None], margin: float
) -> tuple[list[Interval | None], np.ndarray]:
    """The mean difference of each candidate with its interval, and the p-value, float64 [candidates], of a loss of the
    margin or more, all of those with the same number of seeds at once.

    Where several seeds' images can't be paired, p is 1, and the interval's ends are the means of the seeds' own: it is
    wider than theirs together would be, since the standard deviation of a mean is at most the mean of those.
    """
    p, deltas = np.ones(len(found)), _unpaired(found, counts)
    for seeds in {len(one.records) for one, count in zip(found, counts, strict=True) if count is not None}:
        places = [i for i, count in enumerate(counts) if count is not None and len(found[i].records) == seeds]
        table = np.array([counts[i] for i in places], dtype=np.int64)
        n, mean = table.sum(axis=1), table @ scale_of(seeds) / table.sum(axis=1)
        if seeds == 1:  # the same, many times as fast
            z = statistics.tango_z(-margin, table[:, 0], table[:, 2], n)
            low, high = statistics.tango_bounds(table[:, 0], table[:, 2], n)
        else:
            z = statistics.mean_score_z(scale_of(seeds), table, -margin)
            low, high = statistics.mean_score_interval(scale_of(seeds), table)
        p[places] = stats.norm.sf(z)
        for index, place in enumerate(places):
            deltas[place] = Interval(float(mean[index]), float(low[index]), float(high[index]), 0.95, "score")
    return deltas, p


def _unpaired(found: Sequence[Hypothesis], counts: Sequence[np.ndarray | None]) -> list[Interval | None]:
    """The intervals of candidates whose seeds can't be paired, None for the others and where tables lack."""
    tables = [_tables(one) if count is None else [] for one, count in zip(found, counts, strict=True)]
    complete = [(place, table) for place, each in enumerate(tables) if all(each) for table in each if table]
    deltas: list[Interval | None] = [None] * len(found)
    if complete:
        b, c, n = np.array([table for _, table in complete]).T
        ends = np.stack([(c - b) / n, *statistics.tango_bounds(b, c, n)], axis=1)
        places = np.array([place for place, _ in complete])
        for place in dict.fromkeys(places.tolist()):
            value, low, high = ends[places == place].mean(axis=0).tolist()
            deltas[place] = Interval(value, low, high, 0.95, "mean of the seeds' Tango scores")
    return deltas
