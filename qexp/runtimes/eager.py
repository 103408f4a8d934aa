"""PyTorch as it is: what is saved is a state_dict, and the structure is made again from the model and the settings.

A pickled INT8 module saves but does not load; a state_dict does, and without running any code of the file's.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config.schema import Engine
from qexp.errors import RunError, first_line
from qexp.runtimes.base import Loaded, packing_for


def export(module: nn.Module, path: Path) -> Path:
    """Save the state_dict of a fused FP32 model or of a converted INT8 one, what layers share once."""
    state = module.state_dict()
    _share(state)
    torch.save(state, path)
    return path


def _share(state: MutableMapping[str, Any]) -> None:
    """Put one tensor, which torch.save writes once, in the place of all that are equal.

    A layer that is called at several places has a copy for each of them after fusing, and its weights are packed for
    each of them.
    """
    found: dict[tuple[object, ...], list[Tensor]] = {}

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, value))
        if not isinstance(value, Tensor) or value.numel() <= 1:
            return value
        alike = found.setdefault((value.dtype, value.shape, value.stride()), [])
        for other in alike:
            if torch.equal(value, other):
                return other
        alike.append(value)
        return value

    for name in state:
        state[name] = one(state[name])


def load(path: Path, structure: nn.Module, engine: Engine | None, channels_last: bool = False) -> Loaded:
    """Give `structure` (`quantize.fuse` for FP32, `quantize.skeleton` for INT8) what `path` holds in place of its own
    tensors, which are left as they are.

    engine: what an INT8 model was converted for; None for FP32. Raises RunError where the two don't fit.
    """
    with warnings.catch_warnings():
        # torch.load's own doing: it rebuilds quantized tensors from typed storages.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        state = torch.load(path, weights_only=True)
    try:
        with packing_for(engine):
            structure.load_state_dict(state, assign=True)
    except (RuntimeError, KeyError) as error:
        raise RunError(f"{path} doesn't hold the model that these settings make: {first_line(error)}") from error
    structure.eval().requires_grad_(False)
    if channels_last:
        structure.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return Loaded(structure, engine, channels_last)
