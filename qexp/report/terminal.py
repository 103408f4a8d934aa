"""The lines that a sweep or a run prints at its end: recommendation, the runs that matter, effects, next commands."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from tabulate import tabulate

from qexp.report import evidence, formats, sentences, wording
from qexp.report.decision import Answer
from qexp.report.effects import Axis, AxisKind, Effect
from qexp.report.findings import Findings
from qexp.report.next_commands import NextCommands, exportable, from_here
from qexp.report.study import unfinished

# Lines of a screen, and of what a sweep prints around its summary: where the report, the files and MLflow are.
SCREEN, AROUND = 40, 12
MOST_FAILURES = 3
MOST_AXES = 8


def summary(found: Sequence[Findings], columns: int) -> str:
    """Each study: the recommendation in two sentences, the candidates that matter, a line for each setting."""
    lines = (SCREEN - AROUND) // max(1, len(found))
    return "\n\n".join(_study(one, columns, lines) for one in found)


def _study(found: Findings, columns: int, lines: int) -> str:
    heading = formats.shortened(wording.study(found.study), columns)
    said = [line for text in sentences.recommendation(found.headline) for line in textwrap.wrap(text, columns)]
    mattered = _mattered(found, columns)
    waited = textwrap.wrap(wording.lock_waits(found.study.finished), columns)
    room = lines - len(said) - len(mattered) - len(waited) - len(("heading", "", "", "", "")[: 4 + bool(waited)])
    parts = [[heading, *said], _candidates(found, columns, room), mattered, waited]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _candidates(found: Findings, columns: int, room: int) -> list[str]:
    """The candidates that matter, as wide as the terminal, and below them what is left out and what did not finish.

    room: for so many lines, but for at least three candidates.
    """
    rows = evidence.rows(found.headline)
    below = 2 + 1 + min(MOST_FAILURES + 1, len(unfinished(found.study.records)))
    most = min(evidence.MOST, max(3, room - below))
    lines = _fitting(rows[:most], columns)
    if len(rows) > most:
        lines.append(f"and {formats.count(len(rows) - most, 'more candidate')}, in the report")
    ended = unfinished(found.study.records)
    for record in ended[:MOST_FAILURES]:
        lines.append(formats.cut(f"{record.status}  {record.name}: {wording.ended(record)}", columns))
    if len(ended) > MOST_FAILURES:
        lines.append(f"and {formats.count(len(ended) - MOST_FAILURES, 'more run')} that did not finish")
    return lines


# From the most to the least important; the last ones are left out where the terminal is narrow.
_COLUMNS = ("setting", "points [95%]", "speedup [95%]", "outcome", "latency, ms", "adjusted p", "size, MB")


def _fitting(rows: Sequence[evidence.Row], columns: int) -> list[str]:
    """The table with as many columns as fit beside whole names; with half-widths for intervals, and at last with names
    cut, where that is too wide."""
    if not rows:
        return ["No run has finished."]
    shown = [heading for heading in _COLUMNS if heading in evidence.columns(rows)]
    for count in range(len(shown), 3, -1):
        table = _table(rows, shown[:count])
        if max(map(len, table)) <= columns:
            return table
    halves = [row.short for row in rows]
    beside = max(map(len, _table([replace(row, name="") for row in halves], shown[:4], "±95%"))) - len("setting")
    room = max(8, columns - beside)
    return _table([replace(row, name=formats.shortened(row.name, room)) for row in halves], shown[:4], "±95%")


def _table(rows: Sequence[evidence.Row], shown: Sequence[str], interval: str = "[95%]") -> list[str]:
    ordered = [heading for heading in evidence.COLUMNS if heading in shown]
    cells = [evidence.cells(row, ordered) for row in rows]
    headings = [heading.replace("[95%]", interval) for heading in ordered]
    return str(tabulate(cells, headings, tablefmt="simple", disable_numparse=True)).splitlines()


def _mattered(found: Findings, columns: int) -> list[str]:
    axes = found.effects.axes
    if not axes:
        return []
    names = [_short(axis, axes) for axis in axes[:MOST_AXES]]
    longest = max(map(len, names))
    lines = [
        formats.cut(f"{name:<{longest}}  {_axis(axis)}", columns)
        for name, axis in zip(names, axes[:MOST_AXES], strict=True)
    ]
    if len(axes) > MOST_AXES:
        lines.append(f"and {formats.count(len(axes) - MOST_AXES, 'more setting')}, in the report")
    return ["What mattered:", *lines]


def _short(axis: Axis, axes: Sequence[Axis]) -> str:
    """The last part of a setting's name, where no other setting has the same."""
    last = axis.setting.rpartition(".")[2]
    return last if sum(last == other.setting.rpartition(".")[2] for other in axes) == 1 else axis.setting


def _axis(axis: Axis) -> str:
    """A setting in one line."""
    if axis.kind is AxisKind.nothing:
        return "changed nothing"
    if axis.kind is AxisKind.unknown:
        return "can't be told from these runs"
    if axis.kind is AxisKind.within_noise:
        points = [one.accuracy.bound for one in axis.effects if one.accuracy and one.accuracy.interval]
        speeds = [one.speed.bound for one in axis.effects if one.speed and one.speed.interval]
        told = [f"{formats.points(max(points))} points"] if points else []
        told += [f"{100 * max(speeds):.1f}% of speed"] if speeds else []
        return f"within noise ({' and '.join(told)} at most)"
    shown = [effect for effect in axis.effects if any(one and one.shown for one in (effect.accuracy, effect.speed))]
    first = max(shown, key=_clearness)
    rest = f"; {len(shown) - 1} more" if len(shown) > 1 else ""
    return f"{first.value} against {axis.first}: {_effect(first)}{rest}"


def _clearness(effect: Effect) -> float:
    """The clearest of an effect's differences, in half-widths of its interval."""
    found = [one.interval for one in (effect.accuracy, effect.speed) if one and one.shown and one.interval]
    nulls = [one.null for one in (effect.accuracy, effect.speed) if one and one.shown and one.interval]
    return max(abs(one.value - null) / max(one.high - one.low, 1e-12) for one, null in zip(found, nulls, strict=True))


def _effect(effect: Effect) -> str:
    told = []
    if effect.accuracy and effect.accuracy.shown:
        told.append(f"points {wording.effect(effect.accuracy, 100, '+.2f')}")
    if effect.speed and effect.speed.shown:
        told.append(f"speed ×{wording.effect(effect.speed, 1, '.2f')}")
    return ", ".join(told)


def next_steps(commands: NextCommands) -> str:
    """Where the report is, and how to ask it again."""
    page = from_here(commands.folder / "report.html")
    return "\n".join([f"Report: {page}", "With another margin:", f"  {commands.report} report.margin=0.01"])


def export_command(found: Sequence[Findings], commands: NextCommands) -> str:
    """The command that writes a folder to serve the first setting that is recommended; empty where none is."""
    recommended = next((one for one in found if one.headline.kind is Answer.ship), None)
    shipped = exportable(recommended) if recommended else None
    if shipped is None:
        return ""
    return f"A folder that serves {formats.cut(shipped.run.name, 40)}:\n  {commands.export(shipped)}"
