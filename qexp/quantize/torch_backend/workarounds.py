"""All workarounds for faults of torch.ao's converted modules, one file each."""

from __future__ import annotations

from torch import nn

from qexp.config.schema import Engine
from qexp.quantize.torch_backend.ignored_quant_max import clamp_codes
from qexp.quantize.torch_backend.missing_state import scales_in_state
from qexp.quantize.torch_backend.stride_bugs import contiguous_clamps, without_strides


def worked_around(converted: nn.Module, quant_max: int, engine: Engine) -> nn.Module:
    """Apply all workarounds to a converted model, in place, and return it; torch's engine must be set to `engine`.

    quant_max: the largest code of activations.
    """
    # torch makes FP32 layers again, with gradients, which TorchScript refuses.
    fixed = scales_in_state(clamp_codes(converted.requires_grad_(False), quant_max))
    return contiguous_clamps(without_strides(fixed, engine), engine)
