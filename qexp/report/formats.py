"""Numbers as text: differences of accuracy in points (hundredths), speedups, latencies, p-values, with their
intervals."""

from __future__ import annotations

import math
import shutil

from qexp.metrics import Metric
from qexp.records import Interval

UNKNOWN = "–"
NARROWEST = 60  # columns


def points(fraction: float, sign: str = "") -> str:
    """A fraction in points, its hundredths: `0.50`. sign: `+` for one also where it is positive, or rounds to zero."""
    digits = Metric.accuracy_delta.digits - 2
    return f"{round(100 * fraction, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 makes 0 of -0


def signed(difference: float) -> str:
    """A difference of accuracies in points: `-0.12`."""
    return points(difference, "+")


def difference(found: Interval | None) -> str:
    """A difference of accuracies with its ends, in points: `-0.12 [-0.40, +0.15]`."""
    return UNKNOWN if found is None else f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"


def factor(found: Interval | None) -> str:
    """A speedup with its ends: `5.32× [5.10, 5.41]`."""
    if found is None:
        return UNKNOWN
    value, low, high = map(Metric.speedup.text, (found.value, found.low, found.high))
    return f"{value}× [{low}, {high}]"


def ms(value: float | None) -> str:
    return UNKNOWN if value is None or math.isnan(value) else Metric.latency_int8.text(value)


def mb(value: float | None) -> str:
    return UNKNOWN if value is None else Metric.size_int8.text(value)


def p_value(p: float) -> str:
    """`0.031`, `0.0004`, `< 0.0001`."""
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.9995 else "1"


def count(number: int, noun: str) -> str:
    """`1 run`, `1,000 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, width: int) -> str:
    """A text cut to `width` characters by leaving out its middle."""
    if len(text) <= width:
        return text
    kept = max(width - 1, 1)
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :] if kept // 2 else ''}"


def cut(text: str, width: int) -> str:
    """A text cut to `width` characters by leaving out its end."""
    return text if len(text) <= width else f"{text[: max(width - 1, 1)].rstrip()}…"


def columns() -> int:
    """The width of the terminal; 100 where there is none."""
    return max(NARROWEST, shutil.get_terminal_size((100, 40)).columns)
