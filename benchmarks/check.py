"""False alarms of the layer check, over the models in conf/, all flows, engines and grids."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.size import sized
from qexp import quantize
from qexp.config import conversion
from qexp.config.composition import CONF
from qexp.config.schema import (
    Activation,
    ActivationObserver,
    Engine,
    Granularity,
    Observer,
    Overflow,
    QConfig,
    Scheme,
    Weight,
    WeightObserver,
)
from qexp.errors import InputError
from qexp.models import float_model
from qexp.quantize.flows import usable_flows
from qexp.quantize.inspection.int8_model import FEW
from qexp.quantize.torch_backend.layer_equivalence import Deviation, layer_deviations

BITS = sized((8, 7, 6, 5, 4, 3, 2), (8,))
MODELS = sized("*", "tiny")
SIDE = 32


def shipped(seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Each of MODELS in conf/model, with random weights and BatchNorm statistics as a trained model may have them."""
    for file in sorted((CONF / "model").glob(f"{MODELS}.yaml")):
        if file.stem == "custom":
            continue
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = conversion.from_hydra(compose("config", [f"model={file.stem}"]), "outputs")
        module = float_model.build(config.model, 10, seed)
        yield file.stem, as_if_trained(module, seed)


def as_if_trained(module: nn.Module, seed: int) -> nn.Module:
    """The model in evaluation mode, with BatchNorm means, variances, weights and biases that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
    return module.eval().requires_grad_(False)


def pictures(count: int, seed: int) -> Tensor:
    """Smooth random images, float32 [count, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, SIDE, SIDE, generator=generator) * 0.2
    return nn.functional.interpolate(coarse, SIDE, mode="bilinear") + fine


def settings(first: int) -> Iterator[QConfig]:
    """QConfigs of all bit widths, each with another combination of the other settings, from number `first` on."""
    ways = itertools.cycle(itertools.product(Granularity, Scheme, Scheme, WeightObserver))
    for bits, (granularity, weights, activations, observer) in zip(
        BITS, itertools.islice(ways, first, None), strict=False
    ):
        weight = Weight(granularity, weights, bits, observer)
        yield QConfig(weight, Activation(activations, bits), Overflow.none, range_after_clamp=True)


def check(outputs: str) -> None:
    """Count the correct layers that the check reports as wrong; print their deviations and the check's cost."""
    torch.set_num_threads(1)
    calibration, images = pictures(8, 1), pictures(FEW, 2)
    spec = quantize.QuantizationSpec(next(settings(0)), Observer(ActivationObserver.minmax), Engine.x86)
    worst: dict[str, Deviation] = {}
    layers = runs = 0
    wrong: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {}
    for name, module in shipped():
        for flow in usable_flows():
            try:
                fused = flow.fuse(module, spec, calibration)
            except InputError as error:
                tqdm.write(f"{name} flow={flow.name}: {error}")
                continue
            jobs = [(e, q) for i, e in enumerate(quantize.supported()) for q in settings(runs + 3 * i)]
            for engine, qconfig in jobs:
                # oneDNN has no kernels for weights with a zero point.
                if engine is Engine.onednn and qconfig.weight.scheme is Scheme.asymmetric:
                    continue
                observer = Observer(ActivationObserver.mse if qconfig.weight.bits % 2 else ActivationObserver.minmax)
                prepared = flow.prepare(
                    fused, replace(spec, qconfig=qconfig, observer=observer, engine=engine), calibration
                )
                if flow.calibrates:
                    quantize.calibrate(prepared, [calibration])
                int8 = flow.convert(prepared)
                started = time.thread_time()
                found = layer_deviations(int8, images)
                seconds.setdefault(f"{name} {flow.name}", []).append(time.thread_time() - started)
                runs += 1
                for one in found:
                    layers += 1
                    if one.fault:
                        where = f"{name} {flow.name} {engine} {qconfig.weight.bits} bits"
                        wrong[f"{where}: {one.name} ({one.computes}) {one.fault}"] += 1
                        continue
                    key = f"{engine} {one.computes}"
                    if key not in worst or one.output > worst[key].output:
                        worst[key] = one
    print(f"{sum(wrong.values())} of {layers} layers of {runs} models are taken for wrong")
    for line, count in wrong.most_common(40):
        print(f"  {count} × {line}")
    for key, one in sorted(worst.items()):
        print(f"  {key:40} output {one.output:.4f} of {one.allowed:g}, read {one.read:.3f}, weight {one.weight:.4f}")
    for key, times in seconds.items():
        print(f"  {key:40} {1000 * statistics.median(times):.0f} ms")
