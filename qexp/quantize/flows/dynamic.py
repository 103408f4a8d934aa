"""Dynamic quantization, the tutorial's point of comparison: weights in INT8, ranges of activations found at run time.

torch supports it for linear (and recurrent) layers, not for convolutions. Only the settings of weights have an effect:
there is nothing to calibrate, and torch itself reduces activations to 7 bits (`reduce_range=True` in its dynamic linear
layer; qnnpack, whose accumulators are exact, keeps 8), so that nothing overflows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import quantize_dynamic
from torch.ao.quantization.observer import default_dynamic_quant_observer

from qexp.config import schema
from qexp.config.schema import Overflow
from qexp.quantize.flow import Flow, Prepared, QuantizationSpec, QuantizedModel
from qexp.quantize.graph.copies import by_modules, each_once, evaluation_copy, sharing_copy
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.quantize.torch_backend.engines import engine
from qexp.quantize.torch_backend.observers import weight_observer


class DynamicFlow(Flow):
    """torch's `quantize_dynamic`."""

    name = schema.FlowName.dynamic
    traced = False
    observes_functions = False
    folds_batchnorm = False

    def leaves_in_float(self, layer: nn.Module, kind: str) -> str:
        plain = f"torch.nn.Linear alone, and this is a {type(layer).__name__}"
        return f"flow=dynamic quantizes {plain if kind == 'linear' else 'linear layers only'}"

    def fuse(self, model: nn.Module, spec: QuantizationSpec, example: Tensor) -> nn.Module:
        """Return an evaluation copy: this flow fuses nothing."""
        return evaluation_copy(model, example)

    def prepare(self, fused: nn.Module, spec: QuantizationSpec, example: Tensor) -> Prepared:
        """Return a copy that is ready for `convert`: there is nothing to observe."""
        return Prepared(self, spec, fused, by_modules(sharing_copy(fused)))

    def convert(self, prepared: Prepared) -> QuantizedModel:
        """Return a copy with dynamically quantized linear layers."""
        qconfig = replace(prepared.spec.qconfig, overflow=Overflow.none)
        weight = weight_observer(qconfig, qconfig.weight.granularity)
        linear: Any = TorchQConfig(activation=default_dynamic_quant_observer, weight=weight)
        module = sharing_copy(prepared.module)
        with engine(prepared.spec.engine), known_deprecations_silenced(), each_once(module):
            quantized = quantize_dynamic(module, {nn.Linear: linear}, dtype=torch.qint8, inplace=True)
        return QuantizedModel(prepared, quantized)
