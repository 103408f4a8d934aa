"""Clamps in a traced graph (ReLU, ReLU6, Hardtanh): tensors that feed only a clamp take their range after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

# A traced graph has no operators that work in place (see in_place.py).
_RELUS = {F.relu, torch.relu, "relu"}
_CLAMP = {torch.clamp, torch.clip, "clamp", "clip"}


@dataclass(frozen=True)
class ValueRange:
    """Values from `low` to `high`, either of which may be infinite."""

    low: float
    high: float

    def contains(self, other: ValueRange) -> bool:
        return self.low <= other.low and other.high <= self.high

    def joined(self, other: ValueRange) -> ValueRange:
        return ValueRange(min(self.low, other.low), max(self.high, other.high))


EVERYTHING = ValueRange(-math.inf, math.inf)
RELU = ValueRange(0.0, math.inf)


def clamp_of(node: fx.Node, modules: dict[str, nn.Module]) -> ValueRange | None:
    """Return the range to which `node` clamps its first argument; None if it is no clamp by constants."""
    if node.op == "call_module":
        return _clamp_of_module(modules[str(node.target)])
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _RELUS:
        return RELU
    if node.target is F.relu6:
        return ValueRange(0.0, 6.0)
    if node.target is F.hardtanh:
        return _constants(node, "min_val", "max_val", (-1.0, 1.0))
    if node.target in _CLAMP:
        return _constants(node, "min", "max", (None, None))
    return None


def _clamp_of_module(module: nn.Module) -> ValueRange | None:
    # ReLU6 is a Hardtanh with bounds of its own.
    if isinstance(module, nn.Hardtanh):
        return ValueRange(float(module.min_val), float(module.max_val))
    return RELU if isinstance(module, nn.ReLU) else None


def _constants(node: fx.Node, low: str, high: str, default: tuple[float | None, float | None]) -> ValueRange | None:
    bounds: list[Any] = []
    for position, (name, otherwise) in enumerate(zip((low, high), default, strict=True), start=1):
        bounds.append(node.args[position] if len(node.args) > position else node.kwargs.get(name, otherwise))
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    return ValueRange(
        -math.inf if bounds[0] is None else float(bounds[0]), math.inf if bounds[1] is None else float(bounds[1])
    )


def clamp_after(node: fx.Node, modules: dict[str, nn.Module]) -> ValueRange | None:
    """Return the range of the clamp that alone reads `node`'s value; None if there is none."""
    users = list(node.users)
    if len(users) != 1 or users[0].args[:1] != (node,):
        return None
    # Eager fusion leaves an Identity in place of a BatchNorm or a ReLU.
    if users[0].op == "call_module" and isinstance(modules[str(users[0].target)], nn.Identity):
        return clamp_after(users[0], modules)
    return clamp_of(users[0], modules)
