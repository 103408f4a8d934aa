"""The code of a model logged with `tracking.log_model=flavor`: copied to MLflow with it, never imported by qexp."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Int8Classifier(PythonModel):
    """A TorchScript INT8 classifier on the engine it was converted for.

    MLflow's own PyTorch flavor knows no engine, and TorchScript packs its weights for whichever is set when it is
    loaded: a model made for qnnpack would run, saturate and answer differently, without a word.
    """

    def load_context(self, context: Any) -> None:
        torch.backends.quantized.engine = context.model_config["engine"]
        self.module = torch.jit.load(context.artifacts["model"], map_location="cpu").eval()

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Logits, float32 [N, classes], of normalised images, float32 [N, 3, H, W]."""
        with torch.inference_mode():
            logits: np.ndarray = self.module(torch.from_numpy(np.ascontiguousarray(model_input))).numpy()
        return logits


set_model(Int8Classifier())
