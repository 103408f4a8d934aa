"""The Q/DQ program of a model: float operators with explicit quantize and dequantize operators between them."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from qexp.quantize.qdq.program import INPUT, place_of, program, quantizing, tensors
from qexp.quantize.qdq.recording import UnsupportedError

__all__ = ["INPUT", "UnsupportedError", "exported", "place_of", "program", "quantizing", "tensors"]


def exported(program: fx.GraphModule, example: Tensor) -> ExportedProgram:
    """Return a model's program (see `program.program`) exported for any number of images.

    example: float32 [n, 3, H, W], n > 1.
    """
    with torch.no_grad():
        return torch.export.export(program, (example,), dynamic_shapes=({0: Dim("batch")},))
