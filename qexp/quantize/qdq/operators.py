"""`decomposed`, the operators that quantize and dequantize in a Q/DQ program.

Both of torch's libraries for quantization register them; the import of torchao takes two seconds, and that of torch.ao
is done already wherever torch has it.
"""

from __future__ import annotations

import torch

try:
    import qexp.quantize.torch_backend.decomposed_operators
except ImportError:
    import qexp.quantize.torchao_backend  # noqa: F401

decomposed = torch.ops.quantized_decomposed
