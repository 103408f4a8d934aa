"""A quantizer of torchao's interface that quantizes what `graph.placement` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from qexp.config.schema import Granularity, Observer, QConfig
from qexp.quantize.calibration.grid import Side, grid
from qexp.quantize.calibration.observers import CHANNEL_SCHEME, TENSOR_SCHEME, bounds
from qexp.quantize.graph.exported import TRANSPOSED
from qexp.quantize.graph.placement import sites
from qexp.quantize.torchao_backend.observers import activation_observer, weight_observer

_ANNOTATION = "quantization_annotation"  # the key under which torchao looks for it in the meta of nodes


class PlacementQuantizer(Quantizer):
    """Quantizes where `qconfig.placement` says, with the observers of a qconfig."""

    def __init__(self, qconfig: QConfig, observer: Observer) -> None:
        super().__init__()
        self._qconfig, self._observer = qconfig, observer

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Write to each node how its output, and its inputs, are quantized."""
        qconfig = self._qconfig
        found = sites(model.graph, qconfig.placement, qconfig.range_after_clamp)
        activation = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=activation_observer(qconfig, self._observer),
            qscheme=TENSOR_SCHEME[qconfig.activation.scheme],
            **bounds(grid(qconfig, Side.activations)),
        )
        for place, shared in found.grids.items():
            spec = activation if shared is None else SharedQuantizationSpec(shared)
            if isinstance(place, tuple):
                source, reader = place
                _annotation(reader).input_qspec_map[source] = spec
            else:
                _annotation(place).output_qspec = spec
        for layer, weight in found.layers.items():
            _annotation(layer).input_qspec_map[weight] = self._weights(layer)
        return model

    def _weights(self, layer: fx.Node) -> QuantizationSpec:
        weight = self._qconfig.weight
        # Transposed convolutions have a scale for all weights, as in torch's other flows.
        per_channel = weight.granularity is Granularity.per_channel and layer.target not in TRANSPOSED
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=weight_observer(self._qconfig, 0 if per_channel else None),
            qscheme=(CHANNEL_SCHEME if per_channel else TENSOR_SCHEME)[weight.scheme],
            **bounds(grid(self._qconfig, Side.weights)),
        )

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing is left to check."""


def _annotation(node: fx.Node) -> Any:
    return node.meta.setdefault(_ANNOTATION, QuantizationAnnotation(_annotated=True))
