"""Imports for jobs of flow=pt2e, in the process that they are forked from, after those of `fork_preload`."""

import contextlib
import gc

import torch.export._trace  # noqa: F401

from qexp.quantize.torchao_backend import quantizer  # noqa: F401

with contextlib.suppress(ImportError):
    import onnxscript  # noqa: F401

gc.collect()
gc.freeze()
