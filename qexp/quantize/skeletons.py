"""Converted modules without weights, into which the saved state of a model is loaded.

A skeleton's ranges are meaningless, so that a scale missing from a saved state shows in the loaded model's outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config.schema import ActivationObserver, Observer, Overflow, WeightObserver
from qexp.quantize.calibration.observers import observers, records_range
from qexp.quantize.flow import Flow, QuantizationSpec, QuantizedModel
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.torch_backend.engines import engine


def skeleton(fused: nn.Module, flow: Flow, spec: QuantizationSpec, example: Tensor) -> nn.Module:
    """Return the module that these settings convert a fused model to, made without data, for another process's state.

    fused: from `flow.fuse`; its weights don't matter, and the skeleton shares those of layers that stay in FP32 until
    others are assigned. example: float32 [n, 3, H, W].
    """
    # The ranges, which these settings choose, are in the state alone.
    weight = replace(spec.qconfig.weight, observer=WeightObserver.minmax)
    qconfig = replace(spec.qconfig, weight=weight, overflow=Overflow.none, range_after_clamp=False)
    plain = replace(spec, qconfig=qconfig, observer=Observer(ActivationObserver.minmax))
    prepared = flow.prepare(fused, plain, example)
    for observer in observers(prepared.module).values():
        if records_range(observer):
            observer(torch.tensor([0.0, 1.0]))
    return flow.convert(prepared).module


def blank_copy(model: QuantizedModel) -> nn.Module:
    """Return a copy of a model in memory without its state: parameters, buffers, scales and zero points are reset."""
    with engine(model.engine):
        copied = sharing_copy(model.module)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros_like(parameter), parameter.requires_grad))
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
        # torch's INT8 modules keep these as plain attributes.
        plain: dict[str, Any] = vars(module)
        for name, value in (("scale", 1.0), ("zero_point", 0)):
            if isinstance(plain.get(name), float | int):
                plain[name] = value
    return copied
