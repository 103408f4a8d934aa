"""torchao's PT2E: a quantizer and observers of its interfaces. Only `flows/pt2e.py` uses this package.

torchao's import takes two seconds, and tries to load libraries for GPUs, whose absence it reports.
"""

from __future__ import annotations

from qexp.system.quiet import quiet

with quiet("torchao", "torch.utils._pytree"):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

__all__ = ["convert_pt2e", "prepare_pt2e"]
