"""TorchScript: traced, frozen and saved. Deprecated, unsupported from Python 3.14, and used here only."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.config import Engine
from qexp.quantize.quiet import known_deprecations_silenced
from qexp.runtimes.model import Loaded, packing_for


def export(module: nn.Module, example: Tensor, path: Path) -> Path:
    """Trace with an example of shape [n, 3, H, W], freeze and save; the saved model takes any n. For INT8, torch's
    engine must be set."""
    # Two images: a trace of a single one would let a model that squeezes its output lose the batch dimension.
    example = torch.cat([example[:1], example[:1]])
    with known_deprecations_silenced(), torch.no_grad():
        # torch's own modules turn their scale and zero point into numbers, which is what a trace should hold.
        warnings.filterwarnings(
            "ignore",
            message="Converting a tensor to a Python (float|integer) might cause the trace to be incorrect",
            category=torch.jit.TracerWarning,
            module=r"torch\.(_ops$|ao\.nn\.quantized\.)",
        )
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), path)
    return path


def load(path: Path, engine: Engine | None) -> Loaded:
    """engine: what an INT8 model was converted for; None for FP32."""
    with known_deprecations_silenced(), packing_for(engine):
        return Loaded(torch.jit.load(path), engine)
