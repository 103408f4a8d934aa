"""What torch.ao's converted modules need before they compute what they should, one file for each fault."""

from __future__ import annotations

from torch import nn

from qexp.config.schema import Engine
from qexp.quantize.torch_backend.ignored_quant_max import hold
from qexp.quantize.torch_backend.missing_state import scales_in_state
from qexp.quantize.torch_backend.stride_bugs import contiguous_clamps, without_strides


def worked_around(converted: nn.Module, highest: int, engine: Engine) -> nn.Module:
    """The converted model, in place, without the faults of torch's kernels; torch's engine must be set to `engine`.

    highest: the largest code of an activation.
    """
    # torch makes what stays in FP32 anew, with gradients, which TorchScript doesn't take.
    held = scales_in_state(hold(converted.requires_grad_(False), highest))
    return contiguous_clamps(without_strides(held, engine), engine)
