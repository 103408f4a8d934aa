"""A run as text: in one line, while a sweep runs, and in half a screen, where it ran by itself."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from qexp.metrics import Metric
from qexp.records import SIMULATED_TAG, Interval, Precision, RunRecord
from qexp.report import accuracies, formats, sentences
from qexp.report.accuracies import SOURCES, together
from qexp.report.candidates import early_end
from qexp.report.study import unfinished, value

MOST_WARNINGS = 4


def line(record: RunRecord) -> str:
    """A run that has finished or was stopped by racing in one line, without headings. A timing that can't be trusted
    has a `?`."""
    accuracy = accuracies.accuracy(record)
    ms, ratio = together(record, Metric.latency_fp32, Metric.latency_int8), _speedup(record)
    size, layers = together(record, Metric.size_fp32, Metric.size_int8), _layers(record)
    mark = "?" if record.tags.get("latency_valid") == "false" else ""
    source = f" ({accuracy.source})" if accuracy and accuracy.source else " (simulated)" if simulated(record) else ""
    parts = [
        record.name,
        early_end(record),
        f"{_arrow(Metric.accuracy_int8, accuracy.fp32, accuracy.int8)}{source}" if accuracy else "",
        formats.difference(accuracy.delta) if accuracy else "",
        sentences.conclusion(record.verdict) if record.verdict else "",
        f"{_arrow(Metric.latency_int8, *ms)}{mark}" if ms else "",
        formats.factor(ratio).replace("×", f"×{mark}") if ratio else "",
        _arrow(Metric.size_int8, *size) if size else "",
        layers,
    ]
    return "  ".join(part for part in parts if part)


def simulated(record: RunRecord) -> bool:
    """True where the quantized model is simulated in float."""
    return record.tags.get(SIMULATED_TAG) == "true"


def failures(records: Sequence[RunRecord]) -> str:
    """A line for each run that did not finish, with its sentence."""
    return "\n".join(f"{one.status}  {one.name}: {one.tags.get('error', '')}" for one in unfinished(records))


def summary(record: RunRecord, columns: int) -> str:
    """A run in at most twenty lines: accuracy with its interval, verdict, latency in every runtime, size, warnings."""
    if record.status != "FINISHED":
        return textwrap.fill(failures([record]), columns)
    layers = _layers(record)
    told = {
        "accuracy": _accuracy(record),
        "verdict": sentences.verdict(record.verdict) if record.verdict else "",
        "latency": _latency(record),
        "FP32": _p50s(record, Precision.fp32),
        "INT8": _p50s(record, Precision.int8),
        "size": _size(record),
        "layers": f"{layers} {'simulated' if simulated(record) else 'in INT8'}" if layers else "",
        "machine": _machine(record),
    }
    warnings = [formats.cut(f"! {warning}", columns) for warning in record.warnings.values()]
    if len(warnings) > MOST_WARNINGS:
        rest = formats.count(len(warnings) - MOST_WARNINGS, "more warning")
        warnings[MOST_WARNINGS:] = [f"! and {rest}, in the tags of the run"]
    return "\n".join([formats.cut(record.name, columns), *_beside(told, columns), *warnings])


def _beside(told: Mapping[str, str], columns: int) -> list[str]:
    """Names, each with its text beside it on two lines at most."""
    indent = 2 + max(map(len, told))
    lines = []
    for name, text in told.items():
        wrapped = textwrap.wrap(text, columns - indent, max_lines=2, placeholder=" …")
        lines += [f"{'' if number else name:<{indent}}{line}" for number, line in enumerate(wrapped)]
    return lines


def _accuracy(record: RunRecord) -> str:
    found = accuracies.accuracy(record)
    if found is None:
        return ""
    said = f"{_arrow(Metric.accuracy_int8, found.fp32, found.int8)}, {formats.difference(found.delta)} points (95%)"
    if found.source:
        images = record.metrics.get(Metric.target_images)
        number = "" if images is None else f" on {images:,.0f} images"
        said += f"; on the CPU of target={value(record, 'target')}, {SOURCES[found.source]}{number}"
    elif simulated(record):
        said += "; simulated in float"
    return said


def _latency(record: RunRecord) -> str:
    ms, ratio = together(record, Metric.latency_fp32, Metric.latency_int8), _speedup(record)
    if not ms:
        return ""
    where = f" in {record.params['resolved.runtime']}" if "resolved.runtime" in record.params else ""
    said = f"{_arrow(Metric.latency_int8, *ms)} ms{where}" + (f", {formats.factor(ratio)}" if ratio else "")
    if record.tags.get("latency_valid") == "false":
        said += f"; not to be trusted: {record.tags.get('latency_reason', '')}"
    if carried := record.tags.get("latency_from"):
        said += f"; timed by {carried}, whose INT8 model executes the same operators"
    return said


def _speedup(record: RunRecord) -> Interval | None:
    found = together(record, Metric.speedup, Metric.speedup_low, Metric.speedup_high)
    return Interval(found[0], found[1], found[2], 0.95, "bootstrap of rounds") if found else None


def _p50s(record: RunRecord, precision: Precision) -> str:
    """The latency of every variant of a precision, the fastest first; empty where there is one only."""
    start = f"{precision}_"
    found = Metric.runtime_latency.within(record.metrics)
    mine = {name.removeprefix(start): ms for name, ms in found.items() if name.startswith(start)}
    told = ", ".join(f"{name} {formats.ms(ms)}" for name, ms in sorted(mine.items(), key=lambda pair: pair[1]))
    return f"{told} ms" if len(mine) > 1 else ""


def _size(record: RunRecord) -> str:
    found = together(record, Metric.size_fp32, Metric.size_int8)
    return f"{_arrow(Metric.size_int8, *found)} MB" if found else ""


def _layers(record: RunRecord) -> str:
    found = together(record, Metric.layers_int8, Metric.layers_float)
    return f"{found[0]:.0f} of {sum(found):.0f}" if found else ""


def _machine(record: RunRecord) -> str:
    tags = record.tags
    return f"{tags['cpu']} ({tags['isa']}), torch {tags['torch']}" if {"cpu", "isa", "torch"} <= tags.keys() else ""


def _arrow(metric: Metric, fp32: float, int8: float) -> str:
    return f"{metric.text(fp32)} → {metric.text(int8)}"
