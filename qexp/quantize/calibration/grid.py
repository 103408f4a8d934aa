"""The one place that decides on which integers a tensor lives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qexp.config.schema import Overflow, QConfig

FULL_BITS = 8
QUANT_MAX = 2**FULL_BITS - 1
"""The largest code of an activation that kernels know."""
SAFE_BITS = 7
"""With 7 bits on either side two products of u8 by s8 fit into 16 bits: 255*64*2 = 32640 and 127*128*2 = 32512."""

SAFE_CODE = 2**SAFE_BITS - 1
"""The largest code of 7-bit activations."""


class Side(StrEnum):
    """Which factor of a product a tensor is; each value is also the `Overflow` that narrows it."""

    weights = "weights"
    activations = "activations"


@dataclass(frozen=True)
class Grid:
    """The integers qmin…qmax onto which a tensor's range is mapped; `full` where they are all of the 8-bit type.

    A narrowed grid has fewer and larger steps, and runs on the same 8-bit kernels, which clamp to the type alone.
    Weights are clamped to their grid when they are quantized. Of activations those bits that were asked for are clamped
    to, too (see held.py). A guard narrows the scale alone, as torch's `reduce_range` does: what lies outside the
    calibrated range goes on beyond qmax, up to 255. To clamp it would take time and accuracy, and the sums that it
    makes may still fit.
    """

    qmin: int
    qmax: int

    @property
    def full(self) -> bool:
        return self.qmax - self.qmin == 2**FULL_BITS - 1


def executed_bits(qconfig: QConfig, side: Side) -> int:
    """Bits that `side` really gets: those asked for, or 7 at most where the guard against overflow narrows it.

    Raises ValueError where `qconfig.overflow` is still `auto` (see `saturation.resolve_overflow`).
    """
    if qconfig.overflow is Overflow.auto:
        raise ValueError("qconfig.overflow=auto must be resolved before a grid is made")
    asked = qconfig.weight.bits if side is Side.weights else qconfig.activation.bits
    return min(asked, SAFE_BITS) if qconfig.overflow == side.value else asked


def executed_quant_max(qconfig: QConfig) -> int:
    """The largest code of an activation that is executed: a guard's grid is one of the scale alone."""
    return int(2**qconfig.activation.bits - 1)


def grid(qconfig: QConfig, side: Side) -> Grid:
    """The grid of weights (qint8, -2^(b-1)…2^(b-1)-1) or of activations (quint8, 0…2^b-1)."""
    bits = executed_bits(qconfig, side)
    if side is Side.weights:
        return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Grid(0, 2**bits - 1)
