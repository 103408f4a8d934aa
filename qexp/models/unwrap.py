"""Wrappers that training puts around a network or a part of it, and that compute nothing themselves."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(made: Any) -> Any:
    """What is within DataParallel's or torch.compile's wrappers; anything else as it is.

    In a module the wrappers around its parts are taken off too, in place.
    """
    made = _within(made)
    if isinstance(made, nn.Module):
        for part in list(made.modules()):
            part._modules.update({name: _within(child) for name, child in part._modules.items()})
    return made


def _within(made: Any) -> Any:
    while isinstance(made, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(made, "_orig_mod"):
        made = made._orig_mod if hasattr(made, "_orig_mod") else made.module
    return made
