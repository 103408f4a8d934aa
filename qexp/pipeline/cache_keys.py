"""Cache keys of values that runs of one float model share: each names everything that its value depends on."""

from __future__ import annotations

import json

import torch

from qexp.config import code_digest
from qexp.config.schema import Config
from qexp.data.loading import Data
from qexp.quantize.saturation import kernels


def activations_key(config: Config, data: Data, float_digest: str) -> str:
    """The key of FP32 activations, to their last bit, without the images."""
    executed = [float_digest, config.flow, config.fusion, data.mean, data.std]
    code = code_digest.of("data", "quantize")
    return json.dumps(["activations", executed, kernels.computed_by(config.compute.threads), code])


def float_size_key(float_digest: str) -> str:
    """The key of a float model's size."""
    return json.dumps(["size", float_digest, torch.__version__, code_digest.of("runtimes")])


def fusion_key(config: Config, data: Data, float_digest: str) -> str:
    """The key of the difference of the fused from the float model."""
    return json.dumps(["fusion", activations_key(config, data, float_digest), data.test.digest])
