"""Sizes: of the float model as its owner would ship it, of INT8 what is saved, and what layers share stands once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from qexp import quantize
from qexp.config.schema import Config, Engine, FlowName, RuntimeName
from qexp.metrics import Metric
from qexp.pipeline import input_checks, run
from qexp.quantize import FLOWS
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.runtimes import RUNTIMES
from qexp.runtimes.saved_models import float_size
from tests.helpers.quantizable import BY_TORCH, images, spec, trained

EAGER = RUNTIMES[RuntimeName.eager]
TWO = images(2)
CALLS = 8
WEIGHTS = 64 * 64 * 9  # of the convolution that is called again and again


class Again(nn.Module):
    """One convolution called eight times, with its BatchNorm or without; at the end two layers with one weight."""

    def __init__(self, num_classes: int = 10, norm: bool = False, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.mid = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(CALLS):
            x = self.relu(self.norm(self.mid(x)))
        logits: Tensor = self.fc(self.second(self.first(x.mean((2, 3)))))
        return logits


def own_size(net: nn.Module, folder: Path) -> int:
    torch.save(net.state_dict(), folder / "own.pt")
    return (folder / "own.pt").stat().st_size


@pytest.mark.parametrize("norm", [False, True])
def test_the_size_of_a_float_model_is_that_of_its_own_state_dict(norm: bool, tmp_path: Path) -> None:
    net = trained(Again(norm=norm))
    assert float_size(net, TWO) == pytest.approx(own_size(net, tmp_path), rel=0.01)
    whole = {tensor.data_ptr(): tensor for tensor in net.state_dict().values()}.values()
    assert float_size(net, TWO) == pytest.approx(sum(4 * tensor.numel() for tensor in whole), rel=0.05)


def test_masks_of_pruning_are_not_shipped(tmp_path: Path) -> None:
    net, plain = trained(Again()), own_size(Again(), tmp_path)
    prune.l1_unstructured(net.mid, "weight", 0.5)
    assert own_size(net, tmp_path) > 1.5 * plain
    assert float_size(net, TWO) == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("flow", BY_TORCH)
def test_what_layers_share_is_saved_once_and_read_back_bit_for_bit(flow: FlowName, norm: bool, tmp_path: Path) -> None:
    net = trained(Again(norm=norm))
    fused = FLOWS[flow].fuse(net, spec(), TWO)
    prepared = FLOWS[flow].prepare(fused, spec(engine=Engine.qnnpack), TWO)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, [images(8)])
    int8 = FLOWS[flow].convert(prepared).module
    skeleton = quantize.skeleton(fused, FLOWS[flow], spec(engine=Engine.qnnpack), TWO)
    with quantize.engine(Engine.qnnpack):
        path = EAGER.export(int8, TWO, tmp_path / "int8.pt")
        loaded = EAGER.load(path, lambda: skeleton, Engine.qnnpack)
        with torch.inference_mode():
            assert torch.equal(loaded(TWO), int8(TWO))
    assert EAGER.export(fused, TWO, tmp_path / "fp32.pt").stat().st_size < 1.05 * own_size(net, tmp_path)
    convolution, linear = WEIGHTS * (4 if flow is FlowName.dynamic else 1), 64 * 64
    layers = sum(layer.kind != "batchnorm" for layer in torch_layers.layers(int8, FLOWS[flow], Engine.qnnpack))
    assert 1 < path.stat().st_size / (convolution + linear) < 1.5
    if flow is FlowName.fx:
        assert layers == 1 + CALLS + 3


def test_a_run_reports_what_its_owner_would_ship(composed: Callable[..., Config], tmp_path: Path) -> None:
    net = trained(Again(width=8))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    config = composed(
        *("model=custom", f"model._target_={__name__}.Again", f"model.checkpoint={tmp_path / 'weights.pt'}"),
        *("+model.width=8", "flow=fx", "engine=qnnpack", "latency=off", "calib.batches=1", "per_layer.images=0"),
    )
    input_checks.check_inputs([config])
    (tmp_path / "run").mkdir()
    sizes = run.run_experiment(config, tmp_path / "run").metrics
    assert sizes[Metric.size_fp32] * 1e6 == pytest.approx(own_size(net, tmp_path), rel=0.01)
    int8 = (tmp_path / "run" / "model" / "int8_eager.pt").stat().st_size
    assert sizes[Metric.size_int8] * 1e6 == int8
    assert sizes[Metric.size_ratio] == sizes[Metric.size_fp32] / sizes[Metric.size_int8]
