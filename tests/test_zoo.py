"""Architectures of timm, of kinds that flows have failed at, through both flows and in the runtimes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if not (find_spec("torchao") and find_spec("timm")):
    pytest.skip("it needs the extra zoo: pip install 'qexp[zoo]'", allow_module_level=True)

from benchmarks.zoo import WAYS, network, result
from qexp.config.schema import RuntimeName
from qexp.runtimes.parting import MOST

RUNTIMES = [RuntimeName.onnxruntime, RuntimeName.openvino]
SIZES = {
    "lcnet_050": 96,
    "tinynet_e": 96,
    "poolformer_s12": 64,
    "convmixer_768_32": 28,
    "fastvit_t8": 64,
    "edgenext_xx_small": 64,
    "vit_tiny_patch16_224": None,
    "crossvit_tiny_240": None,
}
EXECUTED = ("lcnet_050", "poolformer_s12")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_network_goes_through_each_flow_and_runtimes_execute_it(name: str) -> None:
    runtimes = RUNTIMES if name in EXECUTED else []
    net, images = network(name, SIZES[name])
    for flow, placement in WAYS:
        found = result(net, flow, placement, images, runtimes)
        assert (found["refused"], found["runtimes_refused"]) == ("", []), (flow, placement)
        int8, layers = found["layers"]["program"]  # normalisations count, and stay in FP32
        assert int8 > layers / 2
        assert found["sqnr_db"] > 0
        for runtime in runtimes:
            assert found["times_rounding"][runtime] < MOST, (flow, placement, runtime)
