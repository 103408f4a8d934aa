"""OpenVINO: executes the model's ONNX file with its CPU plugin, compiled for each batch size.

With an open batch size its shape arithmetic went wrong on a network with a mean over computed axes (EfficientNet-Lite0,
OpenVINO 2026.4), and a fixed one is what people deploy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.errors import RunError, one_line
from qexp.runtimes.base import Loaded
from qexp.runtimes.onnx_file import OnnxRuntime

_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}


class OpenVino(OnnxRuntime):
    """Its kernels are oneDNN's. With ONEDNN_MAX_CPU_ISA=AVX2 all but the depthwise ones saturate (OpenVINO 2026.4, on
    Zen 4)."""

    name = schema.RuntimeName.openvino
    sums_as = Engine.onednn
    saturates_on_avx2 = frozenset({"conv", "conv_transpose", "pointwise", "grouped", "linear"})

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Read the file; the model runs on as many threads as torch has where it is called, and its first call with
        each batch size compiles it for that."""
        package()  # before there are threads
        return Loaded(_Requests(path), None, again=lambda: self.load(path, structure, engine), reentrant=False)

    def layers(self, path: Path, shape: Sequence[int]) -> tuple[int, int]:
        """As in the base class, from the execution graph."""
        made = compiled(path, tuple(shape), torch.get_num_threads()).get_runtime_model()
        facts = [node.get_rt_info() for node in made.get_ordered_ops()]
        of_layers = [one for one in facts if one["layerType"].astype(str) in _LAYERS]
        int8 = sum(one["runtimePrecision"].astype(str) in ("i8", "u8") for one in of_layers)
        return int8, len(of_layers) - int8

    def outputs(self, path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
        made = compiled(path, images.shape, torch.get_num_threads())
        found = made([images])
        return {output.get_any_name(): np.array(found[output]) for output in made.outputs}


class _Requests(nn.Module):
    """Runs an ONNX file, by an inference request for each shape of images and number of threads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._requests = path, dict[tuple[int, ...], Any]()

    def forward(self, images: Tensor) -> Tensor:
        key = torch.get_num_threads(), *images.shape
        if key not in self._requests:
            self._requests[key] = compiled(self._path, tuple(images.shape), key[0]).create_infer_request()
        request = self._requests[key]
        request.infer([images.numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data.copy())


@cache
def package() -> Any:
    """The module openvino, ready to be used by several threads.

    Without its telemetry, which calls home as soon as it is imported. Its first two Tensors of numpy arrays would
    deadlock if two threads made them: pybind11 looks numpy up while it holds a lock that the other waits for with the
    GIL (OpenVINO 2026.4).
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    openvino.Tensor(np.zeros(1, np.float32))
    return openvino


def compiled(path: Path, shape: tuple[int, ...], threads: int) -> Any:
    """An openvino.CompiledModel for images of this shape, [n, 3, H, W]. Raises RunError where it can't be made."""
    core = package().Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 on CPUs that have it, in place of FP32
        "ENABLE_CPU_PINNING": False,  # two models of one process would share a core
    }
    try:
        model = core.read_model(str(path))
        model.reshape(list(shape))
        return core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise RunError(
            f"openvino can't compile {path.name}: {one_line(error)[-200:]}: take openvino out of runtimes"
        ) from error
