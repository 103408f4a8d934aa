"""ONNX Runtime: executes the model's ONNX file; its INT8 kernels replace operators between quantize and dequantize."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.errors import RunError, one_line
from qexp.runtimes import onnx_file
from qexp.runtimes.base import Loaded
from qexp.runtimes.onnx_file import OnnxRuntime

_IN_INT8 = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
_IN_FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"}


class OnnxRuntimeCpu(OnnxRuntime):
    """Its matrix products (MLAS, QgemmU8S8KernelAvx2) add pairs of products in 16 bits on AVX2, by the same instruction
    as FBGEMM's, over the same order of a convolution's terms; its depthwise kernel (qdwconv_avx2.cpp) adds 32-bit
    products, and transposed convolutions run in FP32."""

    name = schema.RuntimeName.onnxruntime
    sums_as = Engine.fbgemm
    saturates_on_avx2 = frozenset({"conv", "pointwise", "grouped", "linear"})

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Open the file; the model runs on as many threads as torch has where it is called."""
        return Loaded(_Sessions(path), None, again=lambda: self.load(path, structure, engine))

    def layers(self, path: Path, shape: Sequence[int]) -> tuple[int, int]:
        """As in the base class, from the optimized graph."""
        import onnx

        with tempfile.TemporaryDirectory(prefix="qexp-onnxruntime-") as folder:
            optimized = Path(folder) / path.name
            session(path, torch.get_num_threads(), optimized)
            kinds = [node.op_type for node in onnx.load(str(optimized)).graph.node]
        return sum(kind in _IN_INT8 for kind in kinds), sum(kind in _IN_FLOAT for kind in kinds)

    def outputs(self, path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
        made = session(path, torch.get_num_threads())
        names = [output.name for output in made.get_outputs()]
        return dict(zip(names, made.run(names, {onnx_file.INPUT: images}), strict=True))


class _Sessions(nn.Module):
    """Runs an ONNX file, in a session for each number of threads: it is fixed when a session is made."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._sessions = path, dict[int, Any]()

    def forward(self, images: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        if threads not in self._sessions:
            self._sessions[threads] = session(self._path, threads)
        (logits,) = self._sessions[threads].run([onnx_file.OUTPUT], {onnx_file.INPUT: images.numpy()})
        return torch.from_numpy(logits)


def session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU. optimized: a file for the graph that it executes. Raises RunError
    where it can't be made."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported; it calls home, from timings too
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # Else its threads wait actively between calls, beside whatever else is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, of which it exports none
        said = one_line(error)[-200:]
        raise RunError(f"onnxruntime can't load {path.name}: {said}: take onnxruntime out of runtimes") from error
