"""More bits than INT8 kernels hold: torch computes the model's Q/DQ program in float, which says what accuracy such a
model would have, and nothing of its speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.quantize import qdq
from qexp.records import Precision, Variant
from qexp.runtimes.base import Loaded, Runtime


class Simulated(Runtime):
    name = schema.RuntimeName.simulated
    reads_program = True

    def tolerance(self, precision: Precision, all_int8: bool) -> float:
        """As in the base class; with another batch size a last bit of a sum may round to the neighbouring code."""
        return super().tolerance(precision, all_int8=False)

    def file(self, precision: Precision) -> str:
        return f"{Variant(precision, self.name)}.pt2"

    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        example = torch.cat([example[:1], example[:1]])  # one image would be taken for a batch size that is fixed
        with path.open("wb") as file:  # since torch warns of other names than *.pt2
            torch.export.save(qdq.exported(qdq.program(model, example, every_clamp=True), example), file)
        return path

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Read the program, which holds its structure."""
        module = torch.export.load(path).module(check_guards=False)
        return Loaded(module, None, again=partial(self.load, path, structure, engine))
