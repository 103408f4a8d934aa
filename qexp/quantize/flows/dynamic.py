"""Dynamic quantization, the tutorial's point of comparison: weights in INT8, ranges of activations taken at run time.

torch has it for linear layers (and recurrent ones), not for convolutions. Of the settings only those of weights have an
effect: there is nothing to calibrate, and activations get 7 bits from torch itself (`reduce_range=True` in its dynamic
linear layer; qnnpack, whose sums are exact, keeps 8), so that nothing overflows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import quantize_dynamic
from torch.ao.quantization.observer import default_dynamic_quant_observer

from qexp.config.schema import Overflow, QConfig
from qexp.quantize.calibration.observers import weight_observer
from qexp.quantize.graph.copies import by_modules, each_once, sharing_copy
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced


def prepare(module: nn.Module, qconfig: QConfig) -> nn.Module:
    """A copy that carries its qconfig, ready for convert: there is nothing to observe."""
    module = by_modules(sharing_copy(module))
    unguarded = dataclasses.replace(qconfig, overflow=Overflow.none)
    weight = weight_observer(unguarded, qconfig.weight.granularity)
    carried: Any = TorchQConfig(activation=default_dynamic_quant_observer, weight=weight)
    module.qexp_dynamic = carried
    return module


def convert(prepared: nn.Module) -> nn.Module:
    """A copy with dynamically quantized linear layers; torch's engine must be set."""
    module = sharing_copy(prepared)
    with known_deprecations_silenced(), each_once(module):
        return quantize_dynamic(module, {nn.Linear: prepared.qexp_dynamic}, dtype=torch.qint8, inplace=True)
