"""Predictions that another run has made already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from qexp.config import code_digest
from qexp.config.schema import Config
from qexp.data.loading import Data
from qexp.quantize.saturation import kernels


def prediction_key(config: Config, data: Data, model: Sequence[str], images: np.ndarray | None = None) -> str:
    """Everything that a model's answers on evaluation images depend on, in their last bit too.

    model: `content`, and in words what was done with it; images: int64 indices, None for all of them.
    """
    chosen = None if images is None else hashlib.sha256(np.ascontiguousarray(images, np.int64).tobytes()).hexdigest()
    shown = [data.test.digest, data.mean, data.std, config.evaluate.batch_size, chosen]
    code = code_digest.of("accuracy", "runtimes", "pipeline.evaluate")
    return json.dumps(["predictions", model, shown, kernels.computed_by(config.compute.threads), code])
