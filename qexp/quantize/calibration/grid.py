"""The grid, qmin…qmax, that each tensor is quantized to: decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qexp.config.schema import KERNEL_BITS, Overflow, QConfig

QUANT_MAX = 2**KERNEL_BITS - 1
"""The largest code of an activation, quint8."""
SAFE_BITS = 7
"""With 7 bits on either side, two products of u8 by s8 fit into 16 bits: 255*64*2 = 32640 and 127*128*2 = 32512."""

SAFE_CODE = 2**SAFE_BITS - 1
"""The largest code of 7-bit activations."""


class Side(StrEnum):
    """The factor of a product that a tensor is; each value is also the `Overflow` that reduces its range."""

    weights = "weights"
    activations = "activations"


@dataclass(frozen=True)
class Grid:
    """The integers qmin…qmax onto which a tensor's range is mapped; `full` if they are all of the 8-bit type.

    A reduced grid has fewer and larger steps, and runs on the same 8-bit kernels, which clamp to the type only. Weights
    are clamped to their grid when they are quantized. Activations are clamped to the bits that were asked for (see
    torch_backend/ignored_quant_max.py). A guard makes only the scale coarser, as torch's `reduce_range` does: values
    outside the calibrated range get codes beyond qmax, up to 255. Clamping them would cost time and accuracy, and their
    accumulators may still fit.
    """

    qmin: int
    qmax: int

    @property
    def full(self) -> bool:
        return self.qmax - self.qmin == QUANT_MAX

    @property
    def levels(self) -> int:
        return self.qmax - self.qmin + 1


def executed_bits(qconfig: QConfig, side: Side) -> int:
    """Return the bits that `side` gets: those asked for, but 7 at most if the guard against overflow reduces its range.

    Raises ValueError if `qconfig.overflow` is still `auto` (see `saturation.kernels.resolve_overflow`).
    """
    if qconfig.overflow is Overflow.auto:
        raise ValueError("qconfig.overflow=auto must be resolved before a grid is made")
    asked = asked_bits(qconfig, side)
    return min(asked, SAFE_BITS) if qconfig.overflow == side.value else asked


def asked_bits(qconfig: QConfig, side: Side) -> int:
    """Return the bits that were asked for."""
    return qconfig.weight.bits if side is Side.weights else qconfig.activation.bits


def executed_quant_max(qconfig: QConfig) -> int:
    """Return the largest code of activations that kernels let through.

    `overflow=activations` makes only the scale coarser, so codes up to 255 still occur.
    """
    return min(asked_grid(qconfig, Side.activations).qmax, QUANT_MAX)


def grid(qconfig: QConfig, side: Side) -> Grid:
    """Return the kernels' grid of weights (qint8, -2^(b-1)…2^(b-1)-1) or of activations (quint8, 0…2^b-1), with 8 bits
    where more are simulated (see simulation.py)."""
    return _of_bits(min(executed_bits(qconfig, side), KERNEL_BITS), side)


def asked_grid(qconfig: QConfig, side: Side) -> Grid:
    """Return the grid of all bits that were asked for, before any guard."""
    return _of_bits(asked_bits(qconfig, side), side)


def _of_bits(bits: int, side: Side) -> Grid:
    if side is Side.weights:
        return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Grid(0, 2**bits - 1)
