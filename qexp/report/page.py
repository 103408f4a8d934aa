"""The findings of a sweep as a page: sections, tables and figures in the order in which one reads them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.report import effects, evidence, figures, formats, html, readings, sentences, wording
from qexp.report.classes import can_be_told
from qexp.report.decision import Answer, Candidate, Recommendation
from qexp.report.findings import Findings
from qexp.report.next_commands import NextCommands, exportable
from qexp.report.study import unfinished

MOST_LISTED = 20
MOST_INTERACTIONS = 4
LONGEST = 110  # characters of a cell


def page(
    title: str, found: Sequence[Findings], records: Sequence[RunRecord], folder: Path, commands: NextCommands
) -> html.Page:
    """The page of all studies. folder: for the figures; commands: that come next."""
    sections = [
        section(one, folder, "" if len(found) == 1 else f"-{number}", commands) for number, one in enumerate(found, 1)
    ]
    return html.Page(title, lead(records, found), sections)


def lead(records: Sequence[RunRecord], found: Sequence[Findings]) -> list[str]:
    """The report's subject, and the runs that it lacks."""
    started = [record.start for record in records if record.start]
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(started))) if started else ""
    said = [f"{formats.count(len(records), 'run')}{f', from {day} on' if day else ''}."]
    if len(found) > 1:
        said.append(f"{len(found)} models, data sets or machines, whose figures can't be compared: a section for each.")
    missing = wording.missing(records)
    return [*said, missing] if missing else said


def section(found: Findings, folder: Path, suffix: str, commands: NextCommands) -> html.Section:
    drawn = _Figures(folder, suffix)
    blocks = [
        html.Block("Recommendation", _recommendation(found, commands)),
        html.Block("Accuracy against latency", _front(found, drawn)),
        html.Block("What mattered", _mattered(found, drawn)),
        html.Block("Calibration", _calibration(found, drawn)),
        html.Block("Layers and classes", [*_layers(found, drawn), *_classes(found, drawn)]),
        html.Block("How far to trust it", _trust(found, commands)),
    ]
    head = found.headline
    answer = html.Answer(str(head.kind), sentences.recommendation(head))
    return html.Section(wording.study(found.study), answer, _tiles(found), [block for block in blocks if block.parts])


class _Figures:
    """Writes figures as files and returns them for the page."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix

    def __call__(self, name: str, figure: Any, alt: str, caption: str = "") -> html.Picture:
        figures.write(figure, self._folder / f"{name}{self._suffix}")
        return html.Picture(figures.inline(figure), alt, caption)


def _tiles(found: Findings) -> list[tuple[str, str, str]]:
    one = found.headline.chosen
    if one is None:
        return []
    fp32 = one.ships.metrics.get(Metric.accuracy_fp32)
    tiles = []
    if one.delta is not None:
        before = "" if fp32 is None else f"FP32 {Metric.accuracy_fp32.text(fp32)}, {one.images:,} images"
        low, high = formats.signed(one.delta.low), formats.signed(one.delta.high)
        tiles.append(("accuracy, INT8 minus FP32", f"{formats.signed(one.delta.value)} points", f"95% [{low}, {high}]"))
        tiles.append(
            (
                "shown to lose less than the margin",
                "yes" if one.qualifies else "no",
                f"adjusted p {formats.p_value(one.adjusted)}; {before}",
            )
        )
    if one.latency is not None:
        low, high = map(Metric.speedup.text, (one.latency.speedup.low, one.latency.speedup.high))
        mark = "" if one.latency.valid else ", not to be trusted"
        tiles.append(
            (
                "speed, times the fastest FP32",
                f"{Metric.speedup.text(one.latency.speedup.value)}×",
                f"95% [{low}, {high}]{mark}",
            )
        )
        tiles.append(
            (
                "latency",
                f"{formats.ms(one.latency.ms)} ms",
                f"FP32 {formats.ms(one.latency.fp32_ms)} ms, in {one.runtime}",
            )
        )
    if one.size_mb is not None:
        size = one.ships.metrics.get(Metric.size_fp32)
        tiles.append(("size", f"{formats.mb(one.size_mb)} MB", "" if size is None else f"FP32 {formats.mb(size)} MB"))
    return tiles


def _recommendation(found: Findings, commands: NextCommands) -> list[Any]:
    head = found.headline
    parts: list[Any] = []
    if head.chosen is not None:
        parts.append(html.Text(wording.ships(head.chosen)))
    if head.kind in (Answer.ship, Answer.stay_on_fp32) and (ships := exportable(found)) is not None:
        parts += [html.Text("To have a folder that serves it:"), html.Command(commands.export(ships))]
    if head.reasons:
        parts += [html.Text("Why:"), html.Items([wording.sentence(reason) for reason in head.reasons])]
    if head.settles:
        parts += [html.Text("What would settle it:"), html.Items([wording.sentence(one) for one in head.settles])]
    parts += _candidates(head)
    for other in found.others:
        where = wording.conditions(other)
        parts += [html.Text(f"{where}: {' '.join(sentences.recommendation(other))}")]
    parts.append(html.Text(head.error_rate, soft=True))
    return parts


def _candidates(head: Recommendation) -> list[Any]:
    rows = evidence.rows(head)
    shown, rest = rows[: evidence.MOST], len(rows) - evidence.MOST
    if not rows:
        return [html.Text("No run has finished, so there is no candidate.")]
    headings = [heading for heading in evidence.columns(shown) if heading != "outcome"]
    caption = (
        f"p: one-sided, of a loss of {100 * head.margin:g} points or more; adjusted for "
        f"{formats.count(len(rows), 'candidate')} (Holm). Intervals are 95%, each by itself."
    )
    if rest > 0:
        caption += f" {formats.count(rest, 'more candidate')} in table.md; every run in runs.csv."
    marks = {
        number: row.mark if row.mark == "chosen" else "out" if row.word == "ruled out" else ""
        for number, row in enumerate(shown)
    }
    cells = [evidence.cells(replace(row, why=formats.cut(row.why, LONGEST)), headings) for row in shown]
    return [html.Table(headings, cells, evidence.NUMBERS, marks, caption)]


def _front(found: Findings, drawn: _Figures) -> list[Any]:
    head = found.headline
    parts: list[Any] = []
    view = figures.view(head, found.front)
    if view.points:
        still = drawn(
            "front", figures.front(head, found.front), "Accuracy difference against latency of every candidate",
            "Each point is a candidate with its 95% intervals. The dashed line is the margin; FP32 is the reference.",
        )  # fmt: skip
        parts.append(html.Front(_front_data(head, view), still, _keys(head)))
        if view.below:
            parts.append(html.Text(f"Below the chart: {_named(view.below)}."))
    elif head.candidates:
        parts.append(html.Text("No candidate has both an accuracy and a timing, so there is nothing to draw."))
    if view.collapsed:
        names = [
            f"{evidence.label(one)} in {one.runtime}: {formats.difference(one.delta)} points" for one in view.collapsed
        ]
        parts += [
            html.Text("Collapsed, and not in the chart: they lose more than half of the accuracy."),
            html.Items(_cut(names)),
        ]
    drawn_or_told = (*view.points, *view.collapsed)
    untimed = [one for one in head.candidates if not any(one is other for other in drawn_or_told)]
    if untimed and view.points:
        parts.append(html.Text(f"Without a timing or an accuracy, and not in the chart: {_named(untimed)}."))
    ended = unfinished(found.study.records)
    if ended:
        parts += [
            html.Text("Not finished, and not in the chart:"),
            html.Items(_cut([f"{one.name}: {wording.ended(one)}" for one in ended])),
        ]
    return parts


def _named(some: Sequence[Candidate]) -> str:
    return ", ".join(_cut([f"{evidence.label(one)} in {one.runtime}" for one in some], 6))


def _cut(texts: Sequence[str], most: int = MOST_LISTED) -> list[str]:
    return [*texts[:most], *([f"and {len(texts) - most:,} more"] if len(texts) > most else [])]


def _keys(head: Recommendation) -> list[tuple[str, str, str]]:
    first = "recommended" if head.kind is Answer.ship else "best, provisional"
    return [
        *([("★", "chosen", first)] if head.chosen else []),
        ("●", "good", "on the front, shown to lose less than the margin"),
        ("◆", "open", "on the front, not shown"),
        ("●", "grey", "another is better in both"),
        ("■", "ink", "FP32"),
    ]


def _front_data(head: Recommendation, view: figures.View) -> dict[str, Any]:
    points = [_point(head, view, one) for one in view.points]
    if view.fp32_ms <= view.right:
        points.append(
            {
                "x": view.fp32_ms, "y": 0, "xlow": None, "xhigh": None, "ylow": None, "yhigh": None, "kind": "fp32",
                "dominated": False, "front": False, "text": ["FP32", f"{formats.ms(view.fp32_ms)} ms, the reference"],
            }
        )  # fmt: skip
    axes = {"x": "latency, ms a call (lower is better)", "y": "INT8 minus FP32 accuracy, points"}
    ends = {"low": view.low, "high": view.high, "left": view.left, "right": view.right}
    beyond = f"FP32 at {formats.ms(view.fp32_ms)} ms →" if view.fp32_ms > view.right else ""
    return {**axes, **ends, "margin": 100 * head.margin, "beyond": beyond, "points": points}


def _point(head: Recommendation, view: figures.View, one: Candidate) -> dict[str, Any]:
    across, upright = figures.latency_interval(one), one.delta
    assert across is not None
    assert upright is not None
    kind = "chosen" if evidence.same(one, head.chosen) else "qualifies" if one.qualifies else "open"
    word, why = evidence.outcome(head, one)
    return {
        "x": across.value, "xlow": across.low, "xhigh": across.high,
        "y": 100 * upright.value, "ylow": 100 * upright.low, "yhigh": 100 * upright.high,
        "kind": kind, "dominated": not view.ahead(one) and kind != "chosen", "front": view.ahead(one),
        "text": [
            f"{evidence.label(one)} in {', '.join(one.runtimes)}",
            f"{formats.difference(one.delta)} points, adjusted p {formats.p_value(one.adjusted)}",
            f"{formats.ms(across.value)} ms, {formats.factor(one.latency.speedup if one.latency else None)} of FP32",
            *([f"{formats.mb(one.size_mb)} MB"] if one.size_mb is not None else []),
            why or word,
        ],
    }  # fmt: skip


def _mattered(found: Findings, drawn: _Figures) -> list[Any]:
    main = found.effects
    if not main.axes:
        return [html.Text("Nothing varied among the finished runs, so no setting's effect can be told.")]
    parts: list[Any] = [html.Items([readings.axis(axis) for axis in main.axes])]
    figure = figures.effects(main)
    if figure is not None:
        parts.append(
            drawn(
                "effects", figure, "Effect of each value of each setting on accuracy and on speed", wording.OF_EFFECTS
            )
        )
    rows = [_effect(axis, effect) for axis in main.axes for effect in axis.effects]
    headings = ["setting", "value", "against", "runs", "pairs", "accuracy, points [95%]", "speed, times [95%]"]
    numbers = frozenset(headings[3:])
    parts.append(html.Folded("The effects as a table", [html.Table(headings, rows, numbers)]))
    parts += [html.Text(text, soft=True) for text in wording.of_effects(main)]
    for number, one in enumerate(found.interactions[:MOST_INTERACTIONS], 1):
        parts.append(
            drawn(
                f"interaction{number}",
                figures.interaction(one),
                f"{one.row} with {one.column}",
                readings.interaction(one),
            )
        )
    if len(found.interactions) > MOST_INTERACTIONS:
        rest = len(found.interactions) - MOST_INTERACTIONS
        parts.append(html.Text(f"{formats.count(rest, 'more pair')} of settings with smaller departures.", soft=True))
    return parts


def _effect(axis: effects.Axis, effect: effects.Effect) -> list[str]:
    return [
        axis.setting, effect.value, axis.first, str(effect.runs), str(effect.pairs),
        wording.effect(effect.accuracy, 100, "+.2f"), wording.effect(effect.speed, 1, ".3f"),
    ]  # fmt: skip


def _calibration(found: Findings, drawn: _Figures) -> list[Any]:
    parts: list[Any] = []
    if found.sizes:
        parts.append(html.Items(_cut(readings.calibration(found.sizes), 8)))
        parts.append(
            drawn(
                "calibration", figures.calibration(found.sizes), "INT8 accuracy against calibration batches",
                "Mean over calibration seeds; the band is their range.",
            )
        )  # fmt: skip
    if found.samples:
        parts.append(html.Text(readings.samples(found.samples)))
    if found.winners:
        parts.append(html.Text(readings.winners(found.winners)))
    return parts


def _layers(found: Findings, drawn: _Figures) -> list[Any]:
    if found.layers is None or found.chosen is None or found.worst is None:
        return []
    figure = figures.layers(found.layers)
    if figure is None:
        return []
    parts: list[Any] = [html.Text(text) for text in readings.layers(found.layers)]
    same = found.chosen.ships.run_id == found.worst.ships.run_id
    cut = f" The {figures.MOST_LAYERS} noisiest are shown." if len(found.layers.chosen) > figures.MOST_LAYERS else ""
    whose = f"This run: {found.chosen.ships.name}. " + ("" if same else f"The worst: {found.worst.ships.name}. ")
    parts.append(
        drawn("layers", figure, "Signal to quantization noise of each layer", f"{whose}First layers at the top.{cut}")
    )
    return parts


def _classes(found: Findings, drawn: _Figures) -> list[Any]:
    if not found.classes:
        return []
    shown = [html.Text(text) for text in readings.classes(found.classes)]
    if not can_be_told(found.classes):
        return shown
    rest = len(found.classes) - figures.MOST_CLASSES
    caption = "Intervals hold for all classes together (95%)."
    caption += (
        f" {formats.count(rest, 'class') if rest == 1 else f'{rest:,} classes'} that lose less are left out."
        if rest > 0
        else ""
    )
    return [*shown, drawn("classes", figures.classes(found.classes), "Accuracy change of each class", caption)]


def _trust(found: Findings, commands: NextCommands) -> list[Any]:
    facts = wording.facts(found)
    parts: list[Any] = [html.Facts(facts)]
    warnings = Counter(text for record in found.study.finished for text in record.warnings.values())
    if warnings:
        number = len(found.study.finished)
        told = [
            text if times == number else f"{text} ({times} of {number} runs)" for text, times in warnings.most_common()
        ]
        parts += [html.Text("Warnings of the runs:"), html.Items(_cut(told, 8))]
    command = next((one.tags["command"] for one in found.study.records if "command" in one.tags), None)
    if command:
        parts += [html.Text("To run it again:"), html.Command(command)]
    parts += [html.Text("To make this report again, with another margin or objective:"), html.Command(commands.report)]
    return parts
