"""PT2E: torch exports any network as a graph of operators, and torchao quantizes that.

https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_ptq.html

The result is a Q/DQ program, which computes in float what INT8 kernels compute: no kernels of torch's execute it, but
those of the runtimes that read it. It takes networks that FX can't trace, and where it quantizes is a setting,
`qconfig.placement`.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, fx, nn

from qexp.config import schema
from qexp.quantize.flow import Flow, Prepared, QuantizationSpec, QuantizedModel
from qexp.quantize.graph.copies import evaluation_copy, sharing_copy
from qexp.quantize.graph.exported import exported
from qexp.quantize.graph.placement import computed_by
from qexp.quantize.graph.tensor_names import set_tensor, tensor_of
from qexp.system.quiet import quiet


class Pt2eFlow(Flow):
    """torchao's PT2E, with a quantizer and observers of this project."""

    name = schema.FlowName.pt2e
    traced = True
    observes_functions = True
    folds_batchnorm = True

    def fuse(self, model: nn.Module, spec: QuantizationSpec, example: Tensor) -> nn.Module:
        """Return the model's graph of aten operators, BatchNorms folded. Raises InputError if torch can't export it."""
        return exported(evaluation_copy(model, example), example)

    def prepare(self, fused: nn.Module, spec: QuantizationSpec, example: Tensor) -> Prepared:
        """Return a copy with an observer at each place that `qconfig.placement` means, and at each weight."""
        from qexp.quantize.torchao_backend import prepare_pt2e
        from qexp.quantize.torchao_backend.observers import feed_weights
        from qexp.quantize.torchao_backend.quantizer import PlacementQuantizer

        quantizer = PlacementQuantizer(spec.qconfig, spec.observer)
        with quiet():
            prepared = _plain(prepare_pt2e(cast(fx.GraphModule, sharing_copy(fused)), quantizer))
        _name_observed(prepared.graph)
        feed_weights(prepared)
        return Prepared(self, spec, fused, prepared)

    def convert(self, prepared: Prepared) -> QuantizedModel:
        """Return the Q/DQ program, whose weights are INT8."""
        from qexp.quantize.torchao_backend import convert_pt2e

        with quiet():
            copied = cast(fx.GraphModule, sharing_copy(prepared.module))
            return QuantizedModel(prepared, _plain(convert_pt2e(copied)))


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """Return the graph as a module of its own, with the tensors that it reads, and without torchao's methods."""
    module.graph.eliminate_dead_code()
    plain = fx.GraphModule(module, module.graph).requires_grad_(False)
    plain.meta.update(module.meta)  # by which torchao knows what it has prepared
    return plain


def _name_observed(graph: fx.Graph) -> None:
    """Name what observers see, in place: a layer's output by the layer, though a clamp follows it, and its weight."""
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        source = node.all_input_nodes[0]
        if source.op == "get_attr":
            reader = next(iter(node.users))
            set_tensor(node, f"{tensor_of(reader)}.weight")
        else:
            set_tensor(node, tensor_of(computed_by(source)))
