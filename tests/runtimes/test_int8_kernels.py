"""INT8 kernels of the runtimes' own at the extremes, in a way that holds with and without VNNI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qexp.config.schema import Config, Engine, RuntimeName
from qexp.quantize.saturation import kernels
from qexp.runtimes import RUNTIMES, int8_kernels
from qexp.runtimes.onnx_file import OnnxRuntime
from tests.helpers import ROOT

THEIRS = [RuntimeName.onnxruntime, RuntimeName.openvino]


@pytest.mark.parametrize("runtime", THEIRS)
def test_the_probe_runs_in_int8_and_finds_what_torchs_kernels_do(runtime: RuntimeName, tmp_path: Path) -> None:
    named = RUNTIMES[runtime]
    assert isinstance(named, OnnxRuntime)
    shape = 1, 128, 8, 8
    assert named.layers(int8_kernels._write(tmp_path / "probe.onnx"), shape) == (len(kernels.probed_layers()), 0)
    codes = int8_kernels.probe(runtime)
    assert codes.keys() == kernels.probed_layers().keys()
    dense = kernels.probe().dense_saturates(Engine.onednn)  # true without VNNI
    without_transposed = named.saturates_on_avx2 - {"conv_transpose"}
    assert kernels.saturating(codes) == (without_transposed if dense else frozenset())
    assert all(code == kernels.EXACT for kind, code in codes.items() if "depthwise" in kind)


ON_AVX2 = """
import json, sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
import torch
from torch import nn
from qexp import quantize
from qexp.config.schema import Engine, FlowName, RuntimeName
from qexp.quantize.torch_backend import emulation
from qexp.runtimes import int8_kernels, onnx_file, openvino
from tests.helpers.quantizable import images
from tests.quantize.torch_backend.test_reduced_range import EXAMPLE, Chain, FLOWS, calibrated, saturating, settings

net = saturating(Chain(), "features.0", "features.3")
int8 = FLOWS[FlowName.fx].convert(calibrated(net, FlowName.fx, settings()))
path = Path(sys.argv[1]) / "int8.onnx"
batch = images(32, seed=5)
with quantize.engine(int8.engine), torch.inference_mode():
    onnx_file.write(int8.module, batch[:2], path)
    exact = quantize.exact(int8.prepared)(batch).numpy()
    emulated = {
        order: emulation.with_emulated_accumulators(int8.module, order)(batch).numpy()
        for order in (Engine.fbgemm, Engine.onednn)
    }
logits = openvino.OpenVino().load(path, nn.Identity, None)(batch).numpy()
distance = lambda other: float(np.sqrt(np.square(logits - other).mean()))
print(json.dumps([int8_kernels.probe(RuntimeName.openvino), distance(exact),
                  {order: distance(other) for order, other in emulated.items()}]))
"""


@pytest.mark.slow
def test_openvino_on_avx2_adds_up_as_torchs_onednn(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ON_AVX2, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    codes, from_exact, from_emulated = json.loads(ended.stdout.splitlines()[-1])
    openvino = RUNTIMES[RuntimeName.openvino]
    assert isinstance(openvino, OnnxRuntime)
    assert kernels.saturating(codes) == openvino.saturates_on_avx2 - {"conv_transpose"}
    assert from_emulated[openvino.sums_as] * 10 < from_exact, (from_emulated, from_exact)


def test_inductor_has_the_kernels_of_torchs_onednn_whatever_the_runs_engine(composed: Callable[..., Config]) -> None:
    config = composed("runtimes=[eager,inductor]", "engine=qnnpack", "target=avx2")
    torchs, inductors = int8_kernels.asked_for(config)
    assert torchs.there == frozenset()
    assert (inductors.name, inductors.order) == ("inductor", Engine.onednn)
    assert inductors.there == kernels.KINDS
    assert int8_kernels.of(config, "inductor") == inductors
