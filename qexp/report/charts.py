"""Charts of a run's results, with matplotlib's Figure alone, so that pyplot, backend and style stay the user's.

matplotlib is slow to import: import this module where a chart is made, not at the top of a file. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

if TYPE_CHECKING:
    from qexp.records import Fidelity

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/); shapes differ as well.
_INSIDE, _OWN, _WORST, _GREY = "#0072B2", "#E69F00", "#D55E00", "#8C8C8C"

_WIDTH = 10.0  # inches
_MARGINS = 1.15  # inches above and below the rows
_NAME = 40  # characters of a layer's name
_LINEAR_PERCENT = 0.01


def layers(fidelities: Iterable[Fidelity], title: str, marked: int = 5) -> Figure:
    """One row for each layer, from the first that runs at the top to the last: its SQNR, and how much of it is clipped.

    title: what was measured, in a line: model, data set, qconfig. marked: how many of the layers that add the most
    noise themselves stand out, a quarter of the rows at most. Raises ValueError where there are no layers.
    """
    rows = tuple(fidelities)
    if not rows:
        raise ValueError("a chart of layers needs at least one layer")
    inches = max(0.1, min(0.22, 20 / len(rows)))
    points = max(4.5, min(8.0, inches * 72 * 0.62))
    height = len(rows) * inches + _MARGINS
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    noise, clipped = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left = (max(len(shortened(row.name)) for row in rows) * points * 0.64 / 72 + 0.25) / _WIDTH
    figure.subplots_adjust(left=left, right=0.975, bottom=0.5 / height, top=1 - 0.65 / height, wspace=0.05)
    bad = _noisiest(rows, min(marked, max(1, len(rows) // 4)))
    size = max(12.0, min(28.0, (inches * 72 * 0.36) ** 2))

    _noise(noise, rows, bad, size)
    _clipped(clipped, rows)
    noise.set_yticks(range(len(rows)), [shortened(row.name) for row in rows], fontsize=points)
    for label, row in zip(noise.get_yticklabels(), rows, strict=True):
        if id(row) in bad:
            label.set_color(_WORST)
            label.set_fontweight("bold")
    noise.set_ylim(len(rows) - 0.4, -0.6)
    for axes in (noise, clipped):
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#E4E4E4", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GREY)
    figure.text(0.012, 1 - 0.2 / height, title, fontsize=11, va="center", fontweight="bold")
    _legend(figure, noise, left, height, has_marks=bool(bad))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, at a resolution at which the smallest labels of `layers` can be read."""
    # Every run of a sweep has one: a sixth more bytes, for a fifth less time.
    figure.savefig(path, format="png", dpi=150, facecolor="white", pil_kwargs={"compress_level": 1})


def shortened(name: str) -> str:
    """A name cut to `_NAME` characters, by leaving out its middle."""
    if len(name) <= _NAME:
        return name
    kept = _NAME - 1
    return f"{name[: kept // 2]}…{name[len(name) - (kept - kept // 2) :]}"


def _noisiest(rows: Sequence[Fidelity], count: int) -> set[int]:
    known = [(row.own_sqnr_db, id(row)) for row in rows if row.own_sqnr_db is not None and row.own_sqnr_db < math.inf]
    return {row for _, row in sorted(known)[:count]}


def _noise(axes: Axes, rows: Sequence[Fidelity], bad: set[int], size: float) -> None:
    """Draw SQNR; values that are not finite have no marker."""
    places = range(len(rows))
    inside = [finite(row.sqnr_db) for row in rows]
    own = [finite(row.own_sqnr_db) for row in rows]
    axes.hlines(places, inside, own, color="#D9D9D9", linewidth=1.2, zorder=1)
    axes.scatter(inside, places, s=size, color=_INSIDE, marker="o", linewidths=0, zorder=3, label="in the INT8 model")
    for chosen, colour, label in (
        (False, _OWN, "by itself, on FP32 input"),
        (True, _WORST, "adds most noise itself"),
    ):
        values = [value if (id(row) in bad) is chosen else math.nan for value, row in zip(own, rows, strict=True)]
        factor = 1.7 if chosen else 1.1
        axes.scatter(values, places, s=size * factor, color=colour, marker="D", linewidths=0, zorder=2, label=label)
    low = min([value for value in inside + own if math.isfinite(value)], default=0.0)
    axes.set_xlim(left=min(0.0, low - 2))
    axes.set_xlabel("SQNR of the layer's output, dB (higher is better)", fontsize=8)


def _clipped(axes: Axes, rows: Sequence[Fidelity]) -> None:
    """Draw shares in per cent, linear up to a hundredth and logarithmic above: most layers clip nothing, a few a
    lot."""
    values = [row.clipped * 100 for row in rows]
    axes.barh(range(len(rows)), values, height=0.62, color=_GREY, linewidth=0)
    axes.set_xscale("symlog", linthresh=_LINEAR_PERCENT, linscale=0.5)
    ticks = [0.0, 0.01, 0.1, 1.0, 10.0, 100.0]
    # Up to the first that is beyond the longest bar.
    shown = [tick for tick in ticks if tick <= max([*values, 0.1]) * 10]
    axes.set_xlim(0, shown[-1])
    axes.set_xticks(shown)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.set_xlabel("values clipped, %", fontsize=8)


def _legend(figure: Figure, axes: Axes, left: float, height: float, has_marks: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    count = 3 if has_marks else 2
    legend = figure.legend(
        handles[:count],
        labels[:count],
        loc="center left",
        bbox_to_anchor=(left, 1 - 0.48 / height),
        ncols=count,
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
        columnspacing=1.5,
        borderpad=0,
    )
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([26])


def finite(value: float | None) -> float:
    """The value, or NaN where it is unknown or infinite, which no marker is drawn for."""
    return value if value is not None and math.isfinite(value) else math.nan
