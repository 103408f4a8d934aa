"""Figures of a study: the Pareto front, effects, interactions, calibration, layers, classes.

matplotlib's Figure alone, as in charts.py; it is slow to import, so import this module where a figure is made.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qexp.metrics import Metric
from qexp.records import Interval
from qexp.report import formats
from qexp.report.calibration import CalibrationSizes
from qexp.report.charts import finite, shortened
from qexp.report.classes import ClassChange
from qexp.report.contrasts import Difference
from qexp.report.decision import Answer, Candidate, Recommendation
from qexp.report.effects import Interaction, MainEffects
from qexp.report.evidence import same
from qexp.report.layers import LayerComparison, LayerRow

# Okabe and Ito's colours, which the colour-blind tell apart; shapes differ as well.
GOOD, OPEN, CHOSEN, GREY = "#0072B2", "#A66A00", "#D55E00", "#8C8C8C"
# Of text and of lines behind; a page puts its own in their place (see `inline`).
INK, GRID = "#1B1F24", "#DFE3E8"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = ("o", "s", "^", "D", "v", "P")

WIDTH = 8.0  # inches
MOST_ERROR_BARS = 60  # with more points than this, dominated ones have none
MOST_SERIES = len(SERIES)

_STYLE: Any = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "font.size": 9, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "svg.hashsalt": "qexp",
    "text.parse_math": False,  # a name may have dollar signs
}  # fmt: skip


def write(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and as SVG, for print: white, with its letters as outlines."""
    for ending in (".png", ".svg"):
        figure.savefig(path.with_suffix(ending), dpi=150, facecolor="white", metadata=_metadata(ending))
        figure.set_layout_engine("none")  # the first drawing has set all places, which takes half of its time


def inline(figure: Figure) -> str:
    """A figure as SVG for a page of HTML: in the page's colours and letters, without references to elsewhere."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qexp"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=_metadata(".svg"))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\swidth="[\d.]+pt"|\sheight="[\d.]+pt"', "", text, count=2)
    for colour, name in ((INK, "ink"), (GRID, "line"), (GOOD, "good"), (OPEN, "open"), (CHOSEN, "chosen")):
        text = text.replace(colour.lower(), f"var(--{name})")
    return text


def _metadata(ending: str) -> dict[str, None] | None:
    """No date and no maker, so that equal figures are equal files."""
    names = {".svg": ("Creator", "Date", "Format", "Type"), ".png": ("Software",)}[ending]
    return dict.fromkeys(names)


def _styled(height: float, rows: int = 1, columns: int = 1, **given: Any) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, **given)


@dataclass(frozen=True, eq=False)
class View:
    """The part of the plane that the front is drawn in.

    points: candidates with an accuracy and a timing; front: those of the Pareto front; collapsed: those that lose more
    than half of FP32's accuracy, which are none of the points; below: points that lie below the chart; low, high: its
    ends in points of accuracy, left, right: in ms; fp32_ms: latency of the fastest FP32, NaN where unknown, and to the
    right of the chart where it is so far from the points that they would lie on a line.
    """

    points: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    collapsed: tuple[Candidate, ...]
    below: tuple[Candidate, ...]
    low: float
    high: float
    left: float
    right: float
    fp32_ms: float

    def ahead(self, one: Candidate) -> bool:
        """True if a candidate is one of the front."""
        return any(same(one, other) for other in self.front)


def view(found: Recommendation, front: Sequence[Candidate]) -> View:
    """The view on the front, and on what lies behind it by up to twice the front's own height."""
    known = [one for one in found.candidates if one.delta is not None]
    collapsed = tuple(one for one in known if _collapsed(one))
    points = tuple(one for one in known if math.isfinite(_ms(one)) and not _collapsed(one))
    ends = [
        end
        for one in points
        if same(one, found.chosen) or any(same(one, other) for other in front)
        for end in _ends(one)
    ]
    low, high = min([*ends, -120 * found.margin]), max([*ends, 0.0])
    furthest = low - 2 * (high - low)
    low = min([low, *(value for one in points if (value := 100 * one.delta.value) >= furthest)])  # type: ignore[union-attr]
    high = max([high, *(100 * one.delta.value for one in points)])  # type: ignore[union-attr]
    room = 0.05 * (high - low)
    below = tuple(one for one in points if 100 * one.delta.value < low)  # type: ignore[union-attr]
    fp32 = min((one.latency.fp32_ms for one in points if one.latency and one.latency.fp32_ms > 0), default=math.nan)
    left, right = _across(points, fp32)
    return View(points, tuple(front), collapsed, below, low - room, high + room, left, right, fp32)


def _across(points: Sequence[Candidate], fp32_ms: float) -> tuple[float, float]:
    """The ends of the chart in ms; FP32 is left out where it is three times as far as the points lie apart."""
    ends = [end for one in points if (found := latency_interval(one)) for end in (found.low, found.high)]
    if not ends:
        return 0.0, 1.0
    left, right = min(ends), max(ends)
    if math.isfinite(fp32_ms) and fp32_ms - right < 3 * (right - left):
        left, right = min(left, fp32_ms), max(right, fp32_ms)
    room = 0.06 * (right - left or right)
    return left - room, right + room


def _collapsed(one: Candidate) -> bool:
    fp32 = one.ships.metrics.get(Metric.accuracy_fp32)
    return one.delta is not None and fp32 is not None and fp32 + one.delta.value < fp32 / 2


def _ends(one: Candidate) -> tuple[float, float]:
    return (100 * one.delta.low, 100 * one.delta.high) if one.delta else (0.0, 0.0)


def front(found: Recommendation, best: Sequence[Candidate]) -> Figure:
    """Accuracy difference against latency, with both intervals; best: the candidates of the Pareto front."""
    figure, axes = _styled(4.6)
    seen = view(found, best)
    drawn = [one for one in seen.points if one not in seen.below]
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.axhline(-100 * found.margin, color=OPEN, linewidth=1.1, linestyle=(0, (6, 4)))
    axes.annotate(
        "margin", (1, -100 * found.margin), (-4, 4), ("axes fraction", "data"), "offset points", ha="right",
        fontsize=8.5, color=OPEN,
    )  # fmt: skip
    behind = [one for one in drawn if not seen.ahead(one) and not same(one, found.chosen)]
    bars = len(drawn) <= MOST_ERROR_BARS
    _points(axes, behind, GREY, "o", 4, "another is better in both", bars=bars, alpha=0.55)
    line = sorted((one for one in drawn if seen.ahead(one)), key=_ms)
    axes.step([_ms(one) for one in line], [_delta(one) for one in line], where="post", color=GOOD, alpha=0.5)
    qualified = {id(one) for one in found.qualified}
    ahead = [one for one in line if not same(one, found.chosen)]
    _points(
        axes,
        [one for one in ahead if id(one) in qualified],
        GOOD,
        "o",
        6,
        "on the front, shown to lose less than the margin",
    )
    _points(axes, [one for one in ahead if id(one) not in qualified], OPEN, "D", 6, "on the front, not shown to")
    label = "recommended" if found.kind is Answer.ship else "best, provisional"
    _points(axes, [one for one in drawn if same(one, found.chosen)], CHOSEN, "*", 13, label)
    if seen.below:
        axes.plot(
            [_ms(one) for one in seen.below], [seen.low] * len(seen.below), "v", markersize=5, color=GREY, alpha=0.7,
            clip_on=False, label="below the chart",
        )  # fmt: skip
    if seen.fp32_ms > seen.right:
        said = f"FP32 at {formats.ms(seen.fp32_ms)} ms →"
        axes.annotate(
            said, (1, 0), (-4, 4), ("axes fraction", "data"), "offset points", ha="right", fontsize=8.5, color=INK
        )
    elif math.isfinite(seen.fp32_ms):
        axes.plot([seen.fp32_ms], [0], marker="s", markersize=7, color=INK, linestyle="none", label="FP32")
    axes.set_xlim(seen.left, seen.right)
    axes.set_ylim(seen.low, seen.high)
    axes.set_xlabel("latency, ms a call (lower is better)")
    axes.set_ylabel("INT8 minus FP32 accuracy, points")
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, fontsize=8.5, frameon=False, labelcolor=INK
        )


def _ms(one: Candidate) -> float:
    return one.latency.ms if one.latency else math.nan


def _delta(one: Candidate) -> float:
    return 100 * one.delta.value if one.delta else math.nan


def _points(
    axes: Axes, chosen: Sequence[Candidate], colour: str, shape: str, size: float, label: str,
    bars: bool = True, alpha: float = 1.0,
) -> None:  # fmt: skip
    if not chosen:
        return
    x, y = [_ms(one) for one in chosen], [_delta(one) for one in chosen]
    if bars:
        across = _lengths([latency_interval(one) for one in chosen])
        upright = _lengths([_hundredfold(one.delta) for one in chosen])
        axes.errorbar(x, y, xerr=across, yerr=upright, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6 * alpha)
    axes.plot(x, y, marker=shape, markersize=size, color=colour, alpha=alpha, linestyle="none", label=label)


def latency_interval(one: Candidate) -> Interval | None:
    """The latency in ms with the interval that its speedup's implies, FP32's latency held; None where not timed."""
    if one.latency is None:
        return None
    found = one.latency
    scale = found.ms * found.speedup.value
    return Interval(found.ms, scale / found.speedup.high, scale / found.speedup.low, 0.95, found.speedup.method)


def _hundredfold(found: Interval | None) -> Interval | None:
    return found and Interval(100 * found.value, 100 * found.low, 100 * found.high, found.confidence, found.method)


def _lengths(found: Sequence[Interval | None]) -> list[list[float]]:
    """Lengths below and above, as matplotlib wants them."""
    below = [max(one.value - one.low, 0) if one else 0.0 for one in found]
    above = [max(one.high - one.value, 0) if one else 0.0 for one in found]
    return [below, above]


def effects(found: MainEffects) -> Figure | None:
    """Each value of each setting against the setting's first, on accuracy and on speed; None where there is none."""
    rows = [(axis, effect) for axis in found.axes for effect in axis.effects if effect.accuracy or effect.speed]
    if not rows:
        return None
    timed = any(effect.speed for _, effect in rows)
    figure, (panels,) = _styled(0.28 * len(rows) + 1.1, 1, 1 + timed, sharey=True, squeeze=False)
    left = panels[0]
    names = [f"{axis.setting.rpartition('.')[2]}: {effect.value} against {axis.first}" for axis, effect in rows]
    _forest(left, [effect.accuracy for _, effect in rows], 100, 0.0, "accuracy, points")
    if timed:
        _forest(panels[1], [effect.speed for _, effect in rows], 1, 1.0, "speed, times")
    left.set_yticks(range(len(rows)), [shortened(name) for name in names], fontsize=8.5)
    left.set_ylim(len(rows) - 0.4, -0.6)
    _legend(figure, left)
    return figure


def _forest(axes: Axes, found: Sequence[Difference | None], scale: float, null: float, label: str) -> None:
    axes.axvline(null, color=INK, linewidth=0.9)
    for shown, colour, shape, said in ((True, CHOSEN, "D", "shown"), (False, GREY, "o", "within noise, or unknown")):
        places = [place for place, one in enumerate(found) if one and one.shown is shown]
        picked = [one for one in found if one and one.shown is shown]
        if picked:
            across = _lengths([_scaled(one, scale) for one in picked])
            axes.errorbar(
                [scale * one.value for one in picked], places, xerr=across, fmt=shape, color=colour, markersize=5,
                elinewidth=1.4, label=said,
            )  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)


def _scaled(one: Difference, scale: float) -> Interval | None:
    found = one.interval
    return found and Interval(scale * one.value, scale * found.low, scale * found.high, found.confidence, found.method)


def interaction(found: Interaction) -> Figure:
    """Two settings together: mean accuracy difference and speedup of each combination; empty cells have no run."""
    panels: list[tuple[str, Sequence[Sequence[float | None]], Callable[[float], str], float]] = [
        ("INT8 minus FP32 accuracy, points", found.accuracy, formats.signed, 100),
    ]
    if any(value is not None for row in found.speedup for value in row):
        panels.append(("speedup, times", found.speedup, lambda value: f"{value:.2f}×", 1))
    figure, axes = _styled(0.42 * len(found.rows) + 1.2, 1, len(panels), squeeze=False, sharey=True)
    for (title, cells, text, scale), one in zip(panels, axes[0], strict=True):
        values = [[math.nan if value is None else scale * value for value in row] for row in cells]
        image = one.imshow(values, cmap="cividis", aspect="auto")
        _label_cells(one, cells, values, text, image)
        one.set_title(title, fontsize=9, color=INK)
        one.set_xticks(range(len(found.columns)), [formats.shortened(name, 14) for name in found.columns])
        one.set_xlabel(found.column)
        one.grid(visible=False)
        one.tick_params(length=0)
        for side in one.spines.values():
            side.set_visible(False)
    axes[0][0].set_yticks(range(len(found.rows)), [formats.shortened(name, 22) for name in found.rows])
    axes[0][0].set_ylabel(found.row)
    return figure


def _label_cells(
    axes: Axes, cells: Sequence[Sequence[float | None]], values: Sequence[Sequence[float]],
    text: Callable[[float], str], image: Any,
) -> None:  # fmt: skip
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            if value is not None:
                dark = image.norm(values[row][column]) < 0.55
                axes.text(
                    column, row, text(value), ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )  # fmt: skip


def calibration(found: Sequence[CalibrationSizes]) -> Figure:
    """INT8 accuracy against the number of calibration batches: mean and range over calibration seeds."""
    figure, axes = _styled(3.8)
    labels = sorted({_batches(size.batches) for one in found for size in one.sizes}, key=_order)
    place = {label: index for index, label in enumerate(labels)}
    for number, one in enumerate(found[:MOST_SERIES]):
        x = [place[_batches(size.batches)] for size in one.sizes]
        mean = [100 * sum(size.accuracies) / len(size.accuracies) for size in one.sizes]
        colour = SERIES[number]
        name = " ".join(one.settings.values()) or "mean over calibration seeds"
        axes.plot(x, mean, marker=SHAPES[number], markersize=5, color=colour, label=formats.shortened(name, 34))
        if any(len(size.accuracies) > 1 for size in one.sizes):
            low = [100 * min(size.accuracies) for size in one.sizes]
            high = [100 * max(size.accuracies) for size in one.sizes]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("batches of calibration images")
    axes.set_ylabel("INT8 accuracy, %")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    _legend(figure, axes, columns=2)
    return figure


def _batches(number: int | None) -> str:
    return "all" if number is None else str(number)


def _order(label: str) -> float:
    return math.inf if label == "all" else float(label)


MOST_LAYERS = 60


def layers(found: LayerComparison) -> Figure | None:
    """SQNR of each layer's output in the recommended run, beside the same in the worst run; None without any.

    Of more than MOST_LAYERS, those whose own noise is the largest.
    """
    known = [row for row in found.chosen if row.sqnr_db is not None and math.isfinite(row.sqnr_db)]
    own = {row.name: math.inf if row.own_sqnr_db is None else row.own_sqnr_db for row in known}
    noisiest = sorted(own, key=lambda name: own[name])[:MOST_LAYERS]
    rows = [row for row in known if row.name in noisiest]
    if not rows:
        return None
    other: dict[str, LayerRow] = {row.name: row for row in found.worst}
    figure, axes = _styled(0.19 * len(rows) + 1.1)
    places = range(len(rows))
    worst = [finite(other[row.name].sqnr_db) if row.name in other else math.nan for row in rows]
    axes.hlines(places, worst, [finite(row.sqnr_db) for row in rows], color=GRID, linewidth=1.4)
    if any(map(math.isfinite, worst)):
        axes.plot(worst, places, "D", markersize=4.5, color=GREY, label="worst run")
    axes.plot([finite(row.sqnr_db) for row in rows], places, "o", markersize=5, color=GOOD, label="this run")
    axes.set_yticks(places, [shortened(row.name) for row in rows], fontsize=7.5)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row.name in found.keep:
            label.set_color(CHOSEN)
            label.set_fontweight("bold")
    _rows(axes, len(rows))
    axes.set_xlabel("SQNR of the layer's output, dB (higher is better)")
    _legend(figure, axes)
    return figure


def _rows(axes: Axes, count: int) -> None:
    """Make room for so many rows, the first at the top, without lines between them."""
    axes.set_ylim(count - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


MOST_CLASSES = 30


def classes(found: Sequence[ClassChange]) -> Figure:
    """Accuracy change of each class with its interval, the largest loss at the top."""
    rows = list(found[:MOST_CLASSES])
    figure, axes = _styled(0.22 * len(rows) + 0.9)
    axes.axvline(0, color=INK, linewidth=0.9)
    for shown, colour, shape, said in ((True, CHOSEN, "D", "shown"), (False, GREY, "o", "within noise")):
        picked = [(place, one.change) for place, one in enumerate(rows) if one.shown is shown]
        if picked:
            across = _lengths([_hundredfold(change) for _, change in picked])
            axes.errorbar(
                [100 * change.value for _, change in picked], [place for place, _ in picked], xerr=across, fmt=shape,
                color=colour, markersize=4.5, elinewidth=1.2, label=said,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [formats.shortened(one.name, 28) for one in rows], fontsize=8)
    _rows(axes, len(rows))
    axes.set_xlabel("INT8 minus FP32 accuracy, points")
    _legend(figure, axes)
    return figure
