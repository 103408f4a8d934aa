"""torchao's PT2E: a quantizer and observers of its interfaces. Only `flows/pt2e.py` uses this package.

torchao's import takes two seconds, and tries to load libraries for GPUs, whose absence it reports.
"""

from __future__ import annotations

from torch import fx

from qexp.system.quiet import quiet

with quiet("torchao", "torch.utils._pytree"):
    from torchao.quantization.pt2e import quantize_pt2e

prepare_pt2e = quantize_pt2e.prepare_pt2e


def convert_pt2e(prepared: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with quantize and dequantize operators around float weights. It changes the one that it gets.

    torchao looks for what training with fake quantization leaves around each BatchNorm, which takes it about a hundred
    exports. No graph here comes from that.
    """
    search = quantize_pt2e._fold_conv_bn_qat
    quantize_pt2e._fold_conv_bn_qat = lambda model: model
    try:
        return quantize_pt2e.convert_pt2e(prepared, fold_quantize=False)
    finally:
        quantize_pt2e._fold_conv_bn_qat = search


__all__ = ["convert_pt2e", "prepare_pt2e"]
