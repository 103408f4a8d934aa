"""Runtimes: the ways to execute a saved model, one per module, and `RUNTIMES`, where each is found by its name."""

from __future__ import annotations

from qexp.runtimes.base import Runtime
from qexp.runtimes.eager import Eager
from qexp.runtimes.eager_channels_last import EagerChannelsLast
from qexp.runtimes.inductor import Inductor
from qexp.runtimes.onnxruntime import OnnxRuntimeCpu
from qexp.runtimes.openvino import OpenVino
from qexp.runtimes.simulated import Simulated
from qexp.runtimes.torchscript import TorchScript

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (Eager(), EagerChannelsLast(), TorchScript(), Inductor(), OnnxRuntimeCpu(), OpenVino(), Simulated())
}
