"""Words for what a report states about runs and their measurement; recommendations are worded in sentences.py."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.report import formats
from qexp.report.accuracies import SOURCES
from qexp.report.contrasts import Difference
from qexp.report.decision import Candidate, Recommendation
from qexp.report.effects import MainEffects
from qexp.report.findings import Findings
from qexp.report.study import Study, unfinished, value

OF_EFFECTS = (
    "Each value against the first value of its setting, over pairs of runs that are equal in all other settings. "
    "The intervals hold together at 95%: of accuracies over test images, of speeds over timings."
)


def sentence(clause: str) -> str:
    """A clause with a capital letter and a full stop."""
    return clause[:1].upper() + clause[1:] + ("" if clause.endswith((".", "!", "?")) else ".")


def study(found: Study) -> str:
    """Model, data set and machine, which the runs of a study have in common, and what else tells it from others."""
    first = next(iter(found.finished or found.records))
    tags = first.tags
    target = value(first, "target")
    where = f"{tags['cpu']} ({tags['isa']})" if {"cpu", "isa"} <= tags.keys() else ""
    parts = [f"{value(first, 'model')} on {value(first, 'dataset')}", where]
    if target not in ("native", "n/a"):
        parts.append(f"for target={target}")
    parts.append(found.apart)
    return ", ".join(part for part in parts if part)


def missing(records: Sequence[RunRecord]) -> str:
    """A sentence on runs without an outcome; empty where all have one."""
    words = {"RUNNING": "still running", "SCHEDULED": "not started yet", "FAILED": "failed", "KILLED": "stopped"}
    counts = Counter(record.status for record in unfinished(records))
    told = [f"{counts[status]:,} {word}" for status, word in words.items() if counts[status]]
    if not told:
        return ""
    going_on = "; make the report again when they have ended" if counts["RUNNING"] or counts["SCHEDULED"] else ""
    return f"What is missing: {', '.join(told)}, of {formats.count(len(records), 'run')}{going_on}."


def ended(record: RunRecord) -> str:
    """The end of a run that did not finish, in words."""
    if record.status == "RUNNING":
        return "still running"
    return record.tags.get("error") or record.status.lower()


def lock_waits(runs: Sequence[RunRecord]) -> str:
    """The share of the runs' time that they waited for the machine's lock; empty where it is less than 1%."""
    seconds = {run.run_id: (run.end or run.start) - run.start for run in runs if Metric.lock_wait_share in run.metrics}
    total = sum(seconds.values())
    waited = sum(run.metrics[Metric.lock_wait_share] * seconds[run.run_id] for run in runs if run.run_id in seconds)
    share = waited / total if total else 0.0
    return f"{share:.0%} of the runs' time went to waiting for the machine's lock." if share >= 0.01 else ""


def ships(one: Candidate) -> str:
    """The run that ships, and how much calibration's seed matters to it."""
    run = one.ships
    said = f"The run: {run.name}" + (f", id {run.run_id}" if run.run_id else "") + f", in {one.runtime}"
    if len(one.runtimes) > 1:
        said += f" ({', '.join(one.runtimes)} agree bit for bit)"
    if len(one.deltas) > 1:
        spread = formats.points(stdev(one.deltas))
        said += (
            f". Over {len(one.deltas)} calibration seeds the difference is {formats.signed(fmean(one.deltas))} points, "
            f"with a standard deviation of {spread}; "
            f"this run, that of the first seed, has {formats.signed(one.deltas[0])}"
        )
    return f"{said}."


def conditions(found: Recommendation) -> str:
    """The batch size and number of threads of a recommendation's timings."""
    if found.conditions is None:
        return "Without a timing"
    batch_size, threads = found.conditions
    return f"At batch size {batch_size} with {formats.count(threads, 'thread')}"


def effect(found: Difference | None, scale: float, form: str) -> str:
    """An effect with its interval: `-0.12 [-0.40, +0.15]`."""
    if found is None:
        return formats.UNKNOWN
    text = f"{scale * found.value:{form}}"
    if found.interval is None:
        return text
    return f"{text} [{scale * found.interval.low:{form}}, {scale * found.interval.high:{form}}]"


def of_effects(found: MainEffects) -> list[str]:
    """The runs that the effects don't rest on."""
    said = []
    if found.unpaired:
        said.append(
            f"{formats.count(found.unpaired, 'run')} had no predictions at hand, so intervals of accuracies are wide."
        )
    if found.untimed:
        said.append(
            f"{formats.count(found.untimed, 'run')} had no timing that can be trusted, and count for accuracy only."
        )
    return said


def facts(found: Findings) -> list[tuple[str, str]]:
    """The facts that the figures rest on: names and values."""
    runs, head = found.study.finished, found.headline
    first = runs[0] if runs else found.study.records[0]
    one = found.chosen
    shown = one.ships if one else first
    told = {
        "machine": wherever(found.study.records),
        "software": f"torch {first.tags['torch']}" if "torch" in first.tags else "",
        "code": _commits(runs),
        "float model": first.tags.get("float_model", ""),
        "images": f"{one.images:,} for the test"
        + (f", {head.chosen_by:,} others to choose by" if head.chosen_by else "")
        if one
        else "",
        "FP32 accuracy": _fp32(shown),
        "smallest difference shown in 4 of 5 cases": _points(shown.metrics.get(Metric.detectable)),
        "timings": _timings(runs),
        "FP32 beside itself": _control(found.timing),
        "saturation": _saturation(shown),
        "runs": f"{len(found.study.records):,}, of which {len(runs):,} finished{_raced_out(found.study)}",
        "when": _when(found.study.records),
        "waiting": lock_waits(runs),
    }
    return [(name, text) for name, text in told.items() if text]


def _raced_out(found: Study) -> str:
    """The runs that racing stopped, and the share of images that the race was left with."""
    stopped = found.raced_out
    if not stopped:
        return ""
    seen = sum(one.metrics.get(Metric.race_images, 0.0) for one in stopped)
    every = sum(one.metrics.get(Metric.race_all_images, 0.0) for one in stopped)
    finished = [one.metrics.get(Metric.images, 0.0) for one in found.finished]
    share = (seen + sum(finished)) / max(every + sum(finished), 1.0)
    return f", {len(stopped):,} stopped by racing, with {share:.0%} of the images evaluated"


def wherever(records: Sequence[RunRecord]) -> str:
    """The machines that runs were on."""
    cpus = Counter(f"{one.tags['cpu']} ({one.tags['isa']})" for one in records if {"cpu", "isa"} <= one.tags.keys())
    return "; ".join(
        f"{cpu}" if len(cpus) == 1 else f"{cpu}: {formats.count(number, 'run')}" for cpu, number in cpus.items()
    )


def _commits(runs: Sequence[RunRecord]) -> str:
    commits = dict.fromkeys(one.tags["git_sha"] for one in runs if one.tags.get("git_sha", "none") != "none")
    short = [f"commit {sha[:12]}{' with changes' if sha.endswith('+') else ''}" for sha in commits]
    return ", ".join(short)


def _points(fraction: float | None) -> str:
    return "" if fraction is None else f"{formats.points(fraction)} points"


def _fp32(record: RunRecord) -> str:
    names = (Metric.accuracy_fp32, Metric.fp32_low, Metric.fp32_high)
    if not record.metrics.keys() >= set(names):
        return ""
    value, low, high = (Metric.accuracy_fp32.text(record.metrics[name]) for name in names)
    return f"{value} [{low}, {high}]"


def _timings(runs: Sequence[RunRecord]) -> str:
    known = [one for one in runs if "latency_valid" in one.tags]
    if not known:
        return "none"
    valid = [one for one in known if one.tags["latency_valid"] == "true"]
    shared = sum("latency_from" in one.tags for one in known)
    said = f"{len(valid)} of {formats.count(len(known), 'run')} can be trusted"
    if shared:
        said += f"; {formats.count(shared, 'run')} shared another's, whose INT8 model executes the same operators"
    reasons = Counter(reason for one in known for reason in one.tags.get("latency_reason", "").split("; ") if reason)
    if reasons:
        said += ". Against the others: " + "; ".join(
            f"{reason} ({number})" for reason, number in reasons.most_common(4)
        )
    return said


def _control(document: Mapping[str, Any]) -> str:
    """A variant timed twice side by side, in the run that is shown; empty where the file doesn't say which."""
    rows = document.get("rows", ())
    control = next((row for row in rows if row.get("repeats")), None)
    if control is None:
        return ""
    which = ("batch_size", "threads")
    itself = next(
        row for row in rows if row["variant"] == control["repeats"] and all(row[x] == control[x] for x in which)
    )
    a, b = float(itself["p50"]), float(control["p50"])
    apart = f"{100 * abs(a - b) / min(a, b):.1f}% apart; they should be equal"
    return f"{control['repeats']}: {formats.ms(a)} and {formats.ms(b)} ms, {apart}"


def _saturation(record: RunRecord) -> str:
    source = record.tags.get("accuracy_source", "")
    words = {
        "impossible": "16-bit sums can't saturate in these kernels",
        "possible": "16-bit sums can saturate; none was seen",
        "observed": "16-bit sums saturate",
    }  # fmt: skip
    said = words.get(record.tags.get("saturation", ""), "")
    if source in SOURCES:
        said += f"{'; ' if said else ''}accuracies are those of target={value(record, 'target')}, {SOURCES[source]}"
    return said


def _when(records: Sequence[RunRecord]) -> str:
    times = [moment for one in records for moment in (one.start, one.end or 0.0) if moment]
    if not times:
        return ""
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) for moment in (min(times), max(times)))
    return first if first == last else f"{first} to {last}"
