"""Errors of each layer of the chosen run beside those of the worst, and the layers that would gain most from FP32.

The table of layers (layers.csv) is read from an artifact's bytes; its errors are those of `records.Fidelity`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRow:
    """A layer of one run, in execution order; SQNRs in dB as `records.Fidelity` defines them, None where unknown."""

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
    """The layers of the chosen run, and the same of the worst by name.

    keep: names of the INT8 layers to keep in FP32 first, the one whose own error is largest first.
    """

    chosen: tuple[LayerRow, ...]
    worst: tuple[LayerRow, ...]
    keep: tuple[str, ...]


def read(table: bytes) -> tuple[LayerRow, ...]:
    """The rows of an artifact layers.csv; columns that it lacks are None."""
    raise NotImplementedError


def compare(chosen: bytes, worst: bytes) -> LayerComparison:
    """The two tables of layers side by side."""
    raise NotImplementedError
