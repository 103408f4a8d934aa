"""Scales that torch's INT8 modules omit from their state_dict, so that a loaded model would have other outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import nn

_PLAIN = (nnq.ELU, nnq.Softmax, nnq.PReLU)
_NAMES = ("scale", "zero_point")


def scales_in_state(converted: nn.Module) -> nn.Module:
    """Make such scales and zero points buffers, in place, as in torch's other modules, and return the model."""
    for module in converted.modules():
        plain: dict[str, Any] = {name: vars(module).pop(name) for name in _NAMES if isinstance(module, _PLAIN)}
        for name, value in plain.items():
            module.register_buffer(name, torch.as_tensor(value))
    return converted
