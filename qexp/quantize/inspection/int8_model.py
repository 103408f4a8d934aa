"""Inspection of an INT8 model, whatever it consists of: torch's modules, or a Q/DQ program.

What knows torch's modules is in `torch_backend`, and imported only for models that have them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, fx

from qexp.quantize.flow import QuantizedModel
from qexp.quantize.graph.exported import is_program
from qexp.quantize.inspection.parts import parts
from qexp.quantize.inspection.programs import check_program, program_errors
from qexp.records import Fidelity

FEW = 2
"""Two images suffice: every output element is a test, and another function differs at most elements."""


def check_layers(model: QuantizedModel, images: Tensor) -> None:
    """Raise RunError, naming the first layer in the order of execution that differs from its float counterpart.

    images: float32 [n, 3, H, W], `FEW` of them.
    """
    if is_program(model.module):
        check_program(cast(fx.GraphModule, model.fused), cast(fx.GraphModule, model.module))
        return
    from qexp.quantize.torch_backend import layer_equivalence

    layer_equivalence.check_layers(model, images)


def layer_fidelity(model: QuantizedModel, batches: Iterable[Tensor]) -> tuple[Fidelity, ...]:
    """Return the fidelity of every layer that has a scale of its own, in the order of execution.

    batches: float32 [n, 3, H, W]. A flow that doesn't calibrate has no fixed scales: () is returned. Raises ValueError
    if there are no images.
    """
    if not model.flow.calibrates:
        return ()
    if is_program(model.module):
        with torch.inference_mode():
            return program_errors(cast(fx.GraphModule, model.fused), cast(fx.GraphModule, model.module), parts(batches))
    from qexp.quantize.torch_backend import layer_errors

    return layer_errors.layer_fidelity(model, batches)
