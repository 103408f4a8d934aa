"""Dynamic quantization, the tutorial's point of comparison: weights in INT8, ranges of activations taken at run time.

torch has it for linear layers (and recurrent ones), not for convolutions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import quantize_dynamic
from torch.ao.quantization.observer import default_dynamic_quant_observer

from qexp.config import QConfig
from qexp.quantize.observers import weight_observer
from qexp.quantize.quiet import known_deprecations_silenced

EFFECTIVE = ("qconfig.weight.granularity", "qconfig.weight.scheme", "qconfig.weight.bits", "qconfig.weight.observer")
"""The settings of quantization that change a model of flow=dynamic; all others are n/a: it needs no calibration, and
torch gives the activations 7 bits itself on x86, fbgemm and onednn (`reduce_range=True` in its dynamic linear), so that
nothing overflows."""


def prepare(module: nn.Module, qconfig: QConfig) -> nn.Module:
    """A copy that carries its qconfig, ready for convert: there is nothing to observe."""
    module = copy.deepcopy(module)
    weight = weight_observer(qconfig, qconfig.weight.granularity)
    carried: Any = TorchQConfig(activation=default_dynamic_quant_observer, weight=weight)
    module.qexp_dynamic = carried
    return module


def convert(prepared: nn.Module) -> nn.Module:
    """A copy with dynamically quantized linear layers; torch's engine must be set."""
    with known_deprecations_silenced():
        return quantize_dynamic(prepared, {nn.Linear: prepared.qexp_dynamic}, dtype=torch.qint8)
