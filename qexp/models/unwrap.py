"""Removal of wrappers around a network or its parts that compute nothing, such as DataParallel."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(made: Any) -> Any:
    """The object within DataParallel's or torch.compile's wrappers; anything else as it is.

    Wrappers around submodules are removed too, in place.
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
