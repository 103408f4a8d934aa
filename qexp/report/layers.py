"""Errors of each layer of the chosen run beside those of the worst, and the layers that would gain most from FP32.

The table of layers (layers.csv) is read from an artifact's bytes; its errors are those of `records.Fidelity`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

# 3 dB: a layer that adds twice the noise of the median layer.
STANDS_OUT_DB = 10 * math.log10(2)


@dataclass(frozen=True)
class LayerRow:
    """A layer of one run; SQNRs in dB as `records.Fidelity` defines them, None where unknown."""

    name: str
    kind: str
    int8: bool
    sqnr_db: float | None
    own_sqnr_db: float | None
    weight_sqnr_db: float | None
    clipped: float | None
    saturated: float | None


@dataclass(frozen=True)
class LayerComparison:
    """The layers of the chosen run and those of the worst, each in the order in which they are executed.

    keep: names of the chosen run's layers to keep in FP32, the one whose own error is largest first; empty where none
    stands out.
    """

    chosen: tuple[LayerRow, ...]
    worst: tuple[LayerRow, ...]
    keep: tuple[str, ...]


def read(table: bytes) -> tuple[LayerRow, ...]:
    """The rows of an artifact layers.csv; what it lacks is None."""
    return tuple(
        LayerRow(
            name=line["name"],
            kind=line.get("kind") or "",
            int8=line.get("int8") == "True",
            sqnr_db=_number(line, "sqnr_db"),
            own_sqnr_db=_number(line, "own_sqnr_db"),
            weight_sqnr_db=_number(line, "weight_sqnr_db"),
            clipped=_number(line, "clipped"),
            saturated=_number(line, "saturated"),
        )
        for line in csv.DictReader(io.StringIO(table.decode(), newline=""))
        if line.get("name")
    )


def _number(line: Mapping[str, str | None], column: str) -> float | None:
    text = line.get(column)
    return float(text) if text and not math.isnan(float(text)) else None


def compare(chosen: bytes, worst: bytes) -> LayerComparison:
    """The two tables of layers side by side, and the layers to keep in FP32: see `noisy`."""
    rows = read(chosen)
    return LayerComparison(rows, read(worst), noisy(rows))


def noisy(rows: tuple[LayerRow, ...]) -> tuple[str, ...]:
    """The names of the INT8 layers that add the most noise of their own, which FP32 would spare the model.

    Those whose noise, relative to their output, is at least twice the median INT8 layer's; a quarter of them at most.
    """
    known = sorted((row.own_sqnr_db, row.name) for row in rows if row.int8 and row.own_sqnr_db is not None)
    if not known:
        return ()
    limit = median(sqnr for sqnr, _ in known) - STANDS_OUT_DB
    return tuple(name for sqnr, name in known[: max(1, len(known) // 4)] if sqnr <= limit)
