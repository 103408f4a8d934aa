"""The meaning of `qconfig.placement=auto`: where the runtimes asked for are fastest.

The patterns that networks are made of are quantized in each way and timed in each runtime, once on a machine; the
result stays in the cache. `layers` is closer to FP32, and is taken where it makes none of the runtimes slower.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp import quantize
from qexp.config import code_digest
from qexp.config.schema import ActivationObserver, Config, Observer, Overflow, Placement, RuntimeName, cache_folder
from qexp.latency import protocol
from qexp.quantize.saturation import kernels
from qexp.records import Precision
from qexp.runtimes import RUNTIMES
from qexp.system import cache, machine_lock

SLOWER = 1.05
"""The ratio of times from which a runtime counts as slower."""
CALLS = 200  # of each, 0.2 s


class Patterns(nn.Module):
    """A residual block, an inverted bottleneck, a concatenation, pooling and a linear layer, of [n, 3, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.one, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.expand, self.project = nn.Conv2d(32, 96, 1), nn.Conv2d(96, 32, 1)
        self.depthwise = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.left, self.right = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(64, 100)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.relu(self.two(F.relu(self.one(x))) + x)
        x = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x))))) + x
        x = F.max_pool2d(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1), 2)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resolved(config: Config) -> Placement:
    """The placement that `qconfig.placement` means for the run's flow and runtimes.

    A flow whose layers torch's kernels execute has no choice, since their outputs are INT8; a simulation isn't timed.
    """
    if config.qconfig.placement is not Placement.auto:
        return config.qconfig.placement
    if Placement.layers not in config.flow.placements or config.qconfig.simulated:
        return Placement.every_op
    runtimes = [name for name in config.runtimes if RUNTIMES[name].executes(config.flow, Precision.int8)]
    slower = any(ratio(config, name) > SLOWER for name in runtimes)
    return Placement.every_op if slower or not runtimes else Placement.layers


def ratio(config: Config, name: RuntimeName) -> float:
    """The time of `layers` over that of `every_op`, of the flow's models in a runtime, on one thread; cached."""
    here = [name, RUNTIMES[name].version(), kernels.computed_by(1)]
    key = json.dumps(["placements", config.flow, here, code_digest.of("latency")])
    return cache.number(cache_folder(config), key, lambda: _measured(config, name))


def _measured(config: Config, name: RuntimeName) -> float:
    runtime, calls = RUNTIMES[name], {}
    temporary = tempfile.TemporaryDirectory(prefix="qexp-placement-")
    with temporary as folder, protocol.threads(1), torch.random.fork_rng(devices=[]):
        net, images = Patterns().eval().requires_grad_(False), torch.randn(8, 3, 64, 64)
        for placement in (Placement.every_op, Placement.layers):
            path = Path(folder) / placement / runtime.file(Precision.int8)
            path.parent.mkdir()
            with quantize.engine(config.engine):
                runtime.export(_quantized(config, placement, net, images), images, path)
                calls[placement] = runtime.load(path, lambda: net, None)
        with machine_lock.timing():
            times = medians(calls, images[:1])
    return times[Placement.layers] / times[Placement.every_op]


def _quantized(config: Config, placement: Placement, net: nn.Module, images: Tensor) -> nn.Module:
    qconfig = replace(config.qconfig, placement=placement, overflow=Overflow.none)
    spec = quantize.QuantizationSpec(qconfig, Observer(ActivationObserver.minmax), config.engine)
    flow = quantize.FLOWS[config.flow]
    prepared = flow.prepare(flow.fuse(net, spec, images), spec, images)
    quantize.calibrate(prepared, [images])
    return flow.convert(prepared).module


def medians(calls: Mapping[Placement, Callable[[Tensor], Any]], image: Tensor) -> dict[Placement, float]:
    """The median seconds of each call, one after the other in turns."""
    taken: dict[Placement, list[float]] = {one: [] for one in calls}
    for _ in range(CALLS):
        for one, call in calls.items():
            started = time.perf_counter()
            call(image)
            taken[one].append(time.perf_counter() - started)
    return {one: float(np.median(seconds)) for one, seconds in taken.items()}
