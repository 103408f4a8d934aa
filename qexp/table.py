"""Tracked runs as text: a sweep's final table, and the table of effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tabulate import tabulate

from qexp.config import NOT_APPLICABLE
from qexp.results import Row

HEADERS = ("run", "FP32 → INT8", "points [95%]", "latency, ms", "speedup [95%]", "size, MB", "INT8 layers")


def runs(rows: Sequence[Row]) -> str:
    """A line for each finished run, in the order given; below it what is doubtful, each doubt once with its runs."""
    done = [row for row in rows if row.status == "FINISHED"]
    if not done:
        return "No run was finished."
    marks = {doubt: index for index, doubt in enumerate(dict.fromkeys(d for row in done for d in doubts(row)), start=1)}
    lines = [_line(row, "".join(f" ({marks[doubt]})" for doubt in doubts(row))) for row in done]
    shown = [any(line[column] for line in lines) for column in range(len(HEADERS))]
    table = tabulate(
        [[cell for cell, keep in zip(line, shown, strict=True) if keep] for line in lines],
        [header for header, keep in zip(HEADERS, shown, strict=True) if keep],
        tablefmt="simple",
        disable_numparse=True,
    )
    return "\n".join([table, *(f"({index}) {doubt}" for doubt, index in marks.items())])


def line(row: Row) -> str:
    """One finished run in one line, without headings."""
    return "  ".join(cell for cell in _line(row, "") if cell)


def doubts(row: Row) -> list[str]:
    """The sentences kept in the tag `doubts`, one a line."""
    return [line for line in row.tags.get("doubts", "").splitlines() if line]


def failures(rows: Sequence[Row]) -> str:
    """A line for each run that did not finish, with its sentence."""
    ended = [row for row in rows if row.status != "FINISHED"]
    return "\n".join(f"{row.status}  {row.name}: {row.tags.get('error', '')}" for row in ended)


def _line(row: Row, marks: str) -> list[str]:
    m = row.metrics

    def has(*names: str) -> bool:
        return all(name in m for name in names)

    accuracy = f"{m['accuracy/fp32']:.4f} → {m['accuracy/int8']:.4f}" if has("accuracy/fp32", "accuracy/int8") else ""
    delta = ""
    if has("accuracy/delta", "accuracy/delta_low", "accuracy/delta_high"):
        low, high = 100 * m["accuracy/delta_low"], 100 * m["accuracy/delta_high"]
        delta = f"{100 * m['accuracy/delta']:+.2f} [{low:+.2f}, {high:+.2f}]"
    latency = ""
    if has("latency/fp32_ms", "latency/int8_ms"):
        latency = f"{m['latency/fp32_ms']:.2f} → {m['latency/int8_ms']:.2f}"
    speedup = f"{m['latency/speedup']:.2f}×" if has("latency/speedup") else ""
    if speedup and has("latency/speedup_low", "latency/speedup_high"):
        speedup += f" [{m['latency/speedup_low']:.2f}, {m['latency/speedup_high']:.2f}]"
    size = f"{m['size/fp32_mb']:.2f} → {m['size/int8_mb']:.2f}" if has("size/fp32_mb", "size/int8_mb") else ""
    layers = ""
    if has("quant/layers_int8", "quant/layers_float"):
        int8, left = int(m["quant/layers_int8"]), int(m["quant/layers_float"])
        layers = f"{int8} of {int8 + left}"
    return [row.name + marks, accuracy, delta, latency, speedup, size, layers]


@dataclass(frozen=True)
class Effect:
    """What one value of one setting does, over the runs that have it.

    accuracy, speedup: means over those runs; delta_accuracy, delta_speedup: mean difference to the setting's first
    value, over `pairs` pairs of runs that are equal in every other setting; None where there is no such pair.
    """

    setting: str
    value: str
    runs: int
    accuracy: float
    speedup: float | None
    pairs: int
    delta_accuracy: float | None
    delta_speedup: float | None


def effects(rows: Sequence[Row]) -> list[Effect]:
    """The effect of each value of each setting that varied among the finished runs."""
    done = [row for row in rows if row.status == "FINISHED" and "accuracy/int8" in row.metrics]
    names = [name for name in dict.fromkeys(n for row in done for n in row.params) if not name.startswith("resolved.")]
    varied = [name for name in names if len({row.params.get(name, NOT_APPLICABLE) for row in done}) > 1]
    varied = [name for name in varied if not _follows(name, varied, done)]
    result = []
    for name in varied:
        values = list(dict.fromkeys(row.params.get(name, NOT_APPLICABLE) for row in done))
        held = _held(name, varied, done)
        keyed = [(tuple(row.params.get(other, NOT_APPLICABLE) for other in held), row) for row in done]
        first = {key: row for key, row in keyed if row.params.get(name, NOT_APPLICABLE) == values[0]}
        for value in values:
            having = [(key, row) for key, row in keyed if row.params.get(name, NOT_APPLICABLE) == value]
            pairs = [(first[key], row) for key, row in having if key in first]
            result.append(
                Effect(
                    name,
                    value,
                    len(having),
                    fmean(row.metrics["accuracy/int8"] for _, row in having),
                    _mean([row.metrics.get("latency/speedup") for _, row in having]),
                    len(pairs),
                    _mean([b.metrics["accuracy/int8"] - a.metrics["accuracy/int8"] for a, b in pairs]),
                    _mean([_difference(a, b, "latency/speedup") for a, b in pairs]),
                )
            )
    return result


def effects_text(rows: Sequence[Row]) -> str:
    """The effects as a table; empty where nothing varied."""
    lines = [
        [
            effect.setting,
            effect.value,
            str(effect.runs),
            f"{effect.accuracy:.4f}",
            _signed(effect.delta_accuracy, 100),
            "" if effect.speedup is None else f"{effect.speedup:.2f}×",
            _signed(effect.delta_speedup, 1),
        ]
        for effect in effects(rows)
    ]
    headers = ["setting", "value", "runs", "INT8 accuracy", "points to first", "speedup", "to first"]
    return tabulate(lines, headers, tablefmt="simple", disable_numparse=True) if lines else ""


def _signed(value: float | None, factor: float) -> str:
    return "" if value is None else f"{factor * value:+.2f}"


def _follows(name: str, varied: Sequence[str], rows: Sequence[Row]) -> bool:
    """Whether an earlier setting that varied splits the runs in the same way (a group's choice and its field)."""

    def split(setting: str) -> frozenset[frozenset[int]]:
        groups: dict[str, set[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.params.get(setting, NOT_APPLICABLE), set()).add(index)
        return frozenset(frozenset(group) for group in groups.values())

    return any(split(earlier) == split(name) for earlier in varied[: varied.index(name)])


def _held(name: str, varied: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The settings that are equal in otherwise equal runs: all others but those that can't be while `name` varies, a
    group's choice and the fields that it sets. A field that is swept beside its group's choice is held."""

    def sets(group: str, field: str) -> bool:
        pairs = {(row.params.get(group, NOT_APPLICABLE), row.params.get(field, NOT_APPLICABLE)) for row in rows}
        return field.startswith(f"{group}.") and len(pairs) == len({choice for choice, _ in pairs})

    return [other for other in varied if other != name and not sets(name, other) and not sets(other, name)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _difference(first: Row, second: Row, metric: str) -> float | None:
    if metric in first.metrics and metric in second.metrics:
        return second.metrics[metric] - first.metrics[metric]
    return None
