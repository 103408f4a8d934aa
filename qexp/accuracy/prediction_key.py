"""The cache key of predictions."""

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
    """The key of a model's logits on evaluation images, to their last bit.

    model: its identity (see `saved_models.content`), and words that name how it was changed; images: int64 indices,
    None for all of them.
    """
    chosen = None if images is None else hashlib.sha256(np.ascontiguousarray(images, np.int64).tobytes()).hexdigest()
    shown = [data.test.digest, data.mean, data.std, config.evaluate.batch_size, chosen]
    code = code_digest.of("accuracy", "runtimes", "pipeline.evaluate")
    return json.dumps(["predictions", model, shown, kernels.computed_by(config.compute.threads), code])
