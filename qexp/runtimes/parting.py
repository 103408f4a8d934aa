"""Runtimes whose INT8 logits part from torch's by more than rounding explains, and the layer where that begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from qexp.quantize import qdq
from qexp.runtimes.base import Runtime

MOST = 2.0
"""Two kernels that round every value independently of each other part by √2 of what rounding does to FP32."""


@dataclass(frozen=True)
class Parting:
    """times: the runtime's difference from torch's INT8 logits over that of these from FP32 (root mean squares); layer:
    the first whose tensor in the runtime isn't that of the Q/DQ program, steps: root mean square of their difference,
    in steps of its grid."""

    runtime: str
    times: float
    layer: str
    steps: float


def times_rounding(fp32: np.ndarray, int8: np.ndarray, other: np.ndarray) -> float:
    """The difference of another runtime's INT8 logits from torch's, over that of torch's from FP32's.

    All float32 [n, classes] of the same images. Root mean squares.
    """
    own, quantized = (
        float(np.sqrt(np.square(a - b, dtype=np.float64).mean())) for a, b in ((other, int8), (int8, fp32))
    )
    return own / quantized if quantized else float(own > 0) * np.inf


def first_parted(model: nn.Module, images: Tensor, path: Path, runtime: Runtime) -> tuple[str, float]:
    """The first layer whose tensor differs by more than a step on average from the Q/DQ program's, and by how many; the
    layer that differs most, if none does.

    model: converted; path: its file; images: float32 [n, 3, H, W]. torch's engine must be set.
    """
    program = runtime.program(model, images)
    with torch.inference_mode():
        codes = _Codes(program)
        codes.run(images)
    differences = [
        (name, float(np.sqrt(np.square(found.astype(np.float64) - expected).mean())))
        for (name, expected), found in zip(codes.found, runtime.codes(model, path, images), strict=True)
    ]
    return next((one for one in differences if one[1] > 1), max(differences, key=lambda one: one[1]))


class _Codes(fx.Interpreter):
    """Runs a program; `found` has the codes of what it quantizes, uint8, with the tensors' names."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self._named = dict(zip(qdq.quantizing(program.graph), qdq.tensors(program.graph), strict=True))
        self.found: list[tuple[str, np.ndarray]] = []

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self._named:
            self.found.append((self._named[n], value.numpy()))
        return value
