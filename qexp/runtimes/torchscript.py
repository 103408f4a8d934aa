"""TorchScript: traced, frozen and saved. Deprecated, unsupported from Python 3.14, and used here only."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.config.schema import Engine
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.runtimes.base import Loaded, packing_for


class _Shell(nn.Module):
    """Gives what `module` gives, to be traced and frozen: torch makes a scripted module of every module that belongs to
    a traced one, which takes far longer than the trace, and freezing leaves nothing of them.

    Only what a trace can't take as a constant belongs to it: packed weights, and modules that are scripted already.
    Calls of one shared layer keep their own packed weights, though the file would be smaller with one for all: kernels
    of oneDNN and QNNPACK hold in them what belongs to the scales of one call, and took up to a third longer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)
        parts = list(module.modules())
        packed = [value for part in parts for value in vars(part).values() if isinstance(value, torch.ScriptObject)]
        scripted = [part for part in parts if isinstance(part, torch.jit.ScriptModule)]
        for index, own in enumerate([*packed, *scripted]):
            setattr(self, f"own_{index}", own)

    def forward(self, images: Tensor) -> Tensor:
        (module,) = self._module
        logits: Tensor = module(images)
        return logits


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
        traced = torch.jit.trace(_Shell(module.eval()).eval(), example, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), path)
    return path


def load(path: Path, engine: Engine | None) -> Loaded:
    """engine: what an INT8 model was converted for; None for FP32."""
    with known_deprecations_silenced(), packing_for(engine):
        return Loaded(torch.jit.load(path), engine, again=partial(load, path, engine))
