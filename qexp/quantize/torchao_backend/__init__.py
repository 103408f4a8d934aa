"""torchao's PT2E: a quantizer and observers of its interfaces. Only `flows/pt2e.py` imports this package.

torchao's import takes two seconds, and tries to load libraries for GPUs, whose absence it reports.
"""

from __future__ import annotations

import logging
import warnings

_LOUD = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_before = [logger.level for logger in _LOUD]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _logger in _LOUD:
        _logger.setLevel(logging.ERROR)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    for _logger, _level in zip(_LOUD, _before, strict=True):
        _logger.setLevel(_level)

__all__ = ["convert_pt2e", "prepare_pt2e"]
