"""PyTorch as it is: what is saved is a state_dict, and the structure is made again from the model and the settings.

A pickled INT8 module saves but does not load; a state_dict does, and without running any code of the file's.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from qexp.config import Engine
from qexp.errors import RunError
from qexp.runtimes.model import Loaded, packing_for


def export(module: nn.Module, path: Path) -> Path:
    """Save the state_dict of a fused FP32 model or of a converted INT8 one."""
    torch.save(module.state_dict(), path)
    return path


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
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} doesn't hold the model that these settings make: {reason}") from error
    structure.eval().requires_grad_(False)
    if channels_last:
        structure.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return Loaded(structure, engine, channels_last)
