"""Registers `torch.ops.quantized_decomposed` (see `qdq/operators.py`)."""

import torch.ao.quantization.fx._decomposed  # noqa: F401
