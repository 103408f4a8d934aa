"""The runs whose figures can be compared with each other, and their timings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from qexp.config.identity import FIELDS, GROUPS, NOT_APPLICABLE
from qexp.config.schema import Target
from qexp.metrics import Metric
from qexp.records import CUDA, Interval, Precision, RunRecord, Top1, Variant

SEED = "calib.seed"
# The params that are an axis of their own wherever they vary.
MAIN = frozenset((*GROUPS, *FIELDS))

# Settings, and prefixes of settings, that change how an INT8 model is measured and not the model. The float model's own
# are among them, since all runs of a study have the same.
OF_MEASUREMENT = (
    "model", "train", "seed", "dataset.margin", "runtimes", "latency", "per_layer", "saturation", "compute", "evaluate",
)  # fmt: skip
# Where what was executed is known, it counts in place of what was asked: `auto` and what it stands for are one setting.
EXECUTED = {"qconfig.overflow": "resolved.overflow", "qconfig.placement": "resolved.placement"}


def finished(records: Iterable[RunRecord]) -> list[RunRecord]:
    return [record for record in records if record.status == "FINISHED"]


def unfinished(records: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs without an outcome: neither finished nor stopped by racing."""
    return [record for record in records if record.status != "FINISHED" and not record.raced_out]


def value(record: RunRecord, setting: str) -> str:
    return record.params.get(setting, NOT_APPLICABLE)


def varied(records: Sequence[RunRecord], without: Sequence[str] = ()) -> list[str]:
    """The settings with several values among the records; of those that split the records in the same way the first.

    Not what was resolved, nor a setting that has one value and no effect in the other records: another one says so; nor
    what nobody varied by itself, a group's minor field that goes with the group's choice.
    """
    result: dict[tuple[int, ...], str] = {}
    for name in dict.fromkeys(name for record in records for name in record.params):
        values = [value(record, name) for record in records]
        if name.startswith("resolved.") or name in without or len({*values} - {NOT_APPLICABLE}) < 2:
            continue
        group = name.partition(".")[0]
        if name in MAIN or group not in GROUPS or not sets(group, name, records):
            result.setdefault(tuple(map(values.index, values)), name)
    return list(result.values())


def sets(group: str, field: str, records: Sequence[RunRecord]) -> bool:
    """True if each choice of the group goes with one value of the field in all records."""
    pairs = {(value(record, group), value(record, field)) for record in records}
    return field.startswith(f"{group}.") and len(pairs) == len({choice for choice, _ in pairs})


@dataclass(frozen=True)
class Latency:
    """The timing of a run's INT8 model in one runtime, at one batch size and number of threads.

    ms, fp32_ms: p50 of INT8 and of the fastest FP32 variant, nan where unknown; speedup: of INT8 over that FP32, by
    their rounds. reasons: against trusting it for the target, a clause each; empty where there are none.
    """

    runtime: str
    batch_size: int
    threads: int
    ms: float
    fp32_ms: float
    speedup: Interval
    reasons: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.reasons

    @property
    def measurement(self) -> tuple[float, ...]:
        """Equal for the timings of runs that share one measurement, and, as it has all digits, for no others."""
        return self.ms, self.fp32_ms, self.speedup.value, self.speedup.low, self.speedup.high

    @property
    def log_half_width(self) -> float:
        """Half the width of the interval of the logarithm of the speedup."""
        return math.log(self.speedup.high / self.speedup.low) / 2 if self.speedup.low > 0 else math.inf


Conditions = tuple[int, int]
"""A batch size and a number of threads."""


@dataclass(frozen=True, eq=False)
class Study:
    """Runs of one model on one data set whose figures can be compared: of the same float model, evaluation images,
    target, CPU and kernels.

    records: whatever their status, in the order in which they started; top1: predicted classes by run id, where they
    were fetched; latencies: timings by run id, those at the first batch size and number of threads first; apart: what
    tells it from other studies of the same model, data set and CPU, as a clause, empty where there are none.
    """

    records: tuple[RunRecord, ...]
    top1: Mapping[str, Top1] = field(default_factory=dict)
    latencies: Mapping[str, tuple[Latency, ...]] = field(default_factory=dict)
    apart: str = ""

    @cached_property
    def finished(self) -> tuple[RunRecord, ...]:
        return tuple(finished(self.records))

    @cached_property
    def raced_out(self) -> tuple[RunRecord, ...]:
        """The runs that racing stopped."""
        return tuple(record for record in self.records if record.raced_out)

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The settings of the INT8 model that several finished runs have different values of; calibration's seed is
        none, but one of the ways to have chance come out differently."""
        return _of_model(self.finished)

    @cached_property
    def _varied_at_all(self) -> tuple[str, ...]:
        return _of_model([*self.finished, *self.raced_out])

    @cached_property
    def conditions(self) -> tuple[Conditions, ...]:
        """The batch sizes and numbers of threads of all timings, the first ones first."""
        found = (latency for record in self.finished for latency in self.latencies.get(record.run_id, ()))
        return tuple(dict.fromkeys((latency.batch_size, latency.threads) for latency in found))

    def setting(self, record: RunRecord) -> dict[str, str]:
        """The run's values of the settings that varied, by name; for one that racing stopped, of such runs too."""
        return {name: value(record, name) for name in (self._varied_at_all if record.raced_out else self.varied)}

    def latency(self, record: RunRecord, runtime: str, conditions: Conditions) -> Latency | None:
        """The timing of a run in one runtime; None where there is none."""
        found = self.latencies.get(record.run_id, ())
        return next(
            (one for one in found if (one.runtime, one.batch_size, one.threads) == (runtime, *conditions)), None
        )


def _of_model(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The settings of the INT8 model that several records have different values of."""
    return tuple(name for name in varied(records, without=[SEED]) if not _covered(name, OF_MEASUREMENT))


def studies(
    records: Sequence[RunRecord],
    top1: Mapping[str, Top1] | None = None,
    latency_files: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Study]:
    """The runs as studies, so that figures of two models, machines or sets of images are never blended.

    Runs that have not finished don't know all of what they are split by; they go with the finished runs that they have
    most in common with. latency_files: the content of `latency.json` by run id; where it isn't given, timings are read
    from metrics, which hold those of the first batch size and number of threads.
    """
    files = latency_files or {}
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in finished(records):
        groups.setdefault(_identity(record), []).append(record)
    keys = list(groups) or [()] * bool(records)
    others: list[list[RunRecord]] = [[] for _ in keys]
    for record in records:
        if record.status != "FINISHED":
            alike = [_in_common(record, groups.get(key, [record])[0]) for key in keys]
            others[alike.index(max(alike))].append(record)
    result, beside, apart = [], _beside(records), _apart(groups)
    for key, unfinished in zip(keys, others, strict=True):
        mine = {id(record) for record in (*groups.get(key, ()), *unfinished)}
        chosen = tuple(record for record in records if id(record) in mine)
        latencies = {
            one.run_id: of_file(one, files[one.run_id]) if one.run_id in files else of_metrics(one) for one in chosen
        }
        for name, against in beside.items():
            if name in latencies:
                latencies[name] = tuple(replace(one, reasons=(*one.reasons, against)) for one in latencies[name])
        classes = {one.run_id: top1[one.run_id] for one in chosen if one.run_id in top1} if top1 else {}
        known = {name: found for name, found in latencies.items() if found}
        result.append(Study(chosen, classes, known, apart.get(key, "")))
    return result


# The tags of a finished run that its figures hold for, beside the CPU that `target` means, in words.
_HOLDS_FOR = {"float_digest": "float model", "data_digest": "images", "kernel_signature": "INT8 kernels", "cpu": "CPU"}


def _identity(record: RunRecord) -> tuple[str, ...]:
    target = value(record, "target")  # of no effect in flow=dynamic, whose figures hold for what ran here
    return Target.native if target == NOT_APPLICABLE else target, *(record.tags.get(name, "") for name in _HOLDS_FOR)


def _apart(groups: Mapping[tuple[str, ...], Sequence[RunRecord]]) -> dict[tuple[str, ...], str]:
    """For each group of runs, what tells it from those of the same model, data set and CPU by name, as a clause."""

    def named(record: RunRecord) -> tuple[str, ...]:
        of_study = (value(record, name) for name in ("model", "dataset", "target"))
        return *of_study, *(record.tags.get(name, "") for name in ("cpu", "isa"))

    firsts = {key: records[0] for key, records in groups.items()}
    result = {}
    for key, one in firsts.items():
        alike = [other.tags for other in firsts.values() if named(other) == named(one)]
        differing = [name for name in _HOLDS_FOR if len({tags.get(name) for tags in alike}) > 1]
        result[key] = ", ".join(f"{_HOLDS_FOR[name]} {one.tags.get(name, '')[:8]}".strip() for name in differing)
    return result


def _beside(records: Sequence[RunRecord]) -> dict[str, str]:
    """By run id, the reason against the timings of each run during which another host's run was on the same machine.

    Such hosts are containers, or other namespaces, of one system: each may have a lock of its own, so none knows that
    it has the machine alone.
    """
    machines: dict[str, list[RunRecord]] = {}
    for record in records:
        if {"boot", "host"} <= record.tags.keys():
            machines.setdefault(record.tags["boot"], []).append(record)
    found = {}
    for runs in machines.values():
        if len({one.tags["host"] for one in runs}) < 2:
            continue
        for one in runs:
            others = (
                other.tags["host"] for other in runs if other.tags["host"] != one.tags["host"] and _met(one, other)
            )
            if other_host := next(others, None):
                found[one.run_id] = f"{other_host} ran at the same time, and is the same machine as {one.tags['host']}"
    return found


def _met(one: RunRecord, other: RunRecord) -> bool:
    """True where two runs were going on at the same time."""
    return one.start < (other.end or math.inf) and other.start < (one.end or math.inf)


def _in_common(record: RunRecord, other: RunRecord) -> int:
    """The number of settings and tags that are equal, of those that runs are split by."""
    names = [name for name in other.params if _covered(name, ("model", "dataset", "train", "seed", "target"))]
    tags = sum(record.tags.get(name) == other.tags.get(name) for name in _HOLDS_FOR)
    return tags + sum(record.params.get(name) == other.params[name] for name in names)


def same_setting(record: RunRecord) -> frozenset[tuple[str, str]]:
    """A key that is equal for runs whose INT8 models were made by the same setting, but for calibration's seed."""
    kept = {
        name: text
        for name, text in record.params.items()
        if name != SEED and not _covered(name, OF_MEASUREMENT) and not name.startswith("resolved.")
    }
    executed = {name: record.params[found] for name, found in EXECUTED.items() if found in record.params}
    return frozenset((kept | executed).items())


@cache  # since it is asked of every param of every run
def _covered(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def of_metrics(record: RunRecord) -> tuple[Latency, ...]:
    """The run's timings at the first batch size and number of threads, one of each INT8 runtime."""
    metrics = record.metrics
    lows, highs = (which.within(metrics) for which in (Metric.runtime_speedup_low, Metric.runtime_speedup_high))
    p50s, fp32 = Metric.runtime_latency.within(metrics), metrics.get(Metric.latency_fp32, math.nan)
    batch_size, threads = (_first(record, name) for name in ("latency.batch_sizes", "latency.threads"))
    return tuple(
        Latency(
            runtime,
            batch_size,
            threads,
            p50s.get(str(Variant(Precision.int8, runtime)), math.nan),
            fp32,
            Interval(ratio, lows[runtime], highs[runtime], 0.95, "bootstrap of rounds"),
            _reasons(record),
        )
        for runtime, ratio in Metric.runtime_speedup.within(metrics).items()
        if runtime in lows and runtime in highs and math.isfinite(ratio)
    )


def _first(record: RunRecord, name: str) -> int:
    """The first of a list of numbers, as params write it: `[1,8]`; 1 where nothing is known."""
    text = value(record, name).strip("[]").split(",")[0].strip()
    return int(text) if text.isdigit() else 1


def _reasons(record: RunRecord) -> tuple[str, ...]:
    if record.tags.get("latency_valid") == "true":
        return ()
    return tuple(record.tags.get("latency_reason", "no reason was recorded").split("; "))


def of_file(record: RunRecord, document: Mapping[str, Any]) -> tuple[Latency, ...]:
    """The run's timings at every batch size and number of threads. document: the content of its `latency.json`.

    The reasons against one are those of the measurement at the same batch size and number of threads, where the file
    has them; else of the first.
    """
    rows = [row for row in document.get("rows", ()) if row["variant"] != "control"]
    p50s = {(row["variant"], row["batch_size"], row["threads"]): float(row["p50"]) for row in rows}
    against = {(one["batch_size"], one["threads"]): tuple(one["reasons"]) for one in document.get("validity", ())}
    prefix = f"{Precision.fp32}_"
    fp32: dict[Conditions, str] = {}
    for (variant, *where), ms in p50s.items():
        batch_size, threads = where
        if variant.startswith(prefix) and variant != f"{prefix}{CUDA}":
            fastest = fp32.get((batch_size, threads))
            if fastest is None or ms < p50s[fastest, batch_size, threads]:
                fp32[batch_size, threads] = variant
    found = []
    for pair in document.get("speedups", ()):
        here = pair["batch_size"], pair["threads"]
        if pair["fp32"] == fp32.get(here):
            speedup = Interval(pair["value"], pair["low"], pair["high"], pair["confidence"], pair["method"])
            int8, float32 = (p50s.get((pair[precision], *here), math.nan) for precision in ("int8", "fp32"))
            runtime = pair["int8"].removeprefix(f"{Precision.int8}_")
            found.append(Latency(runtime, *here, int8, float32, speedup, against.get(here, _reasons(record))))
    return tuple(found)
