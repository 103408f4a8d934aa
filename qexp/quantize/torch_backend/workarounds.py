"""What torch.ao's converted modules need before they compute what they should, one file for each fault."""

from __future__ import annotations

from torch import nn

from qexp.config.schema import Engine
from qexp.quantize.torch_backend.ignored_quant_max import clamp_codes
from qexp.quantize.torch_backend.missing_state import scales_in_state
from qexp.quantize.torch_backend.stride_bugs import contiguous_clamps, without_strides


def worked_around(converted: nn.Module, quant_max: int, engine: Engine) -> nn.Module:
    """The converted model, in place, without the faults of torch's kernels; torch's engine must be set to `engine`.

    quant_max: the largest code of an activation.
    """
    # torch makes what stays in FP32 anew, with gradients, which TorchScript doesn't take.
    fixed = scales_in_state(clamp_codes(converted.requires_grad_(False), quant_max))
    return contiguous_clamps(without_strides(fixed, engine), engine)
