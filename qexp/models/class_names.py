"""Classes that are told by their names, where their packages may be missing or are slow to import."""

from __future__ import annotations

from torch import nn


def derives_from(module: nn.Module, *names: str) -> bool:
    """True if a module's class, or one that it inherits from, has one of these full names (`torch.nn.Linear`)."""
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(module).__mro__)
