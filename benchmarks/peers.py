"""qexp's INT8 model against those that other quantizers make of the same float model with the same images.

    make bench BENCH=peers
    QEXP_BENCH_NETWORKS=FILE make bench BENCH=peers     # networks of one's own, see benchmarks/networks.py

The others are ONNX Runtime's `quantize_static` and NNCF's `nncf.quantize`, as their documentation recommends them for
this CPU. All files have a batch of 1 and are executed by the same two runtimes, interleaved and in fresh processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.networks import Network, chosen
from benchmarks.size import sized
from benchmarks.speed import composed
from qexp import statistics
from qexp.config.schema import Config, RuntimeName
from qexp.data.calibration_images import draw
from qexp.data.loading import Data, load_data
from qexp.errors import QexpError
from qexp.latency import protocol
from qexp.models import inference
from qexp.pipeline.measure import LATENCY_IMAGES
from qexp.pipeline.prepare import images_of
from qexp.pipeline.run import run_experiment
from qexp.records import Precision, Predictions, Variant
from qexp.runtimes import RUNTIMES, onnx_file
from qexp.runtimes.base import Loaded
from qexp.system import machine, machine_lock

RUNTIMES_COMPARED = (RuntimeName.onnxruntime, RuntimeName.openvino)
BUILT_IN = sized(Network("resnet18", ("model=resnet18", "train=default")), Network("tiny", ("model=tiny",)))
PROCESSES = sized(5, 1)
BLOCKS = sized(20, 4)  # of each variant, in each process
EXACT = {"amx", "avx512_vnni", "avx_vnni"}  # instruction sets whose products are added up in 32 bits
GOAL = 1.05


@dataclass(frozen=True)
class Peer:
    """A quantizer. package: what it needs; runtimes: those that execute what it makes; make: writes, beside the float
    ONNX file, its INT8 model, calibrated with these images, float32 [1, 3, H, W] each."""

    name: str
    package: str
    runtimes: tuple[RuntimeName, ...]
    make: Callable[[Path, Sequence[np.ndarray]], Path]


def by_onnxruntime(float_file: Path, images: Sequence[np.ndarray]) -> Path:
    """ONNX Runtime's own: preprocessed, Q/DQ, per channel, uint8 activations and int8 weights, of 7 bits without
    VNNI, as its documentation recommends for x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {onnx_file.INPUT: image}

    prepared, made = (float_file.with_name(f"{name}.onnx") for name in ("preprocessed", "by_onnxruntime"))
    quant_pre_process(str(float_file), str(prepared))
    quantize_static(
        str(prepared),
        str(made),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=machine.describe().isa not in EXACT,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return made


def by_nncf(float_file: Path, images: Sequence[np.ndarray]) -> Path:
    """NNCF's own, of the OpenVINO model, with its defaults and all images."""
    from qexp.runtimes.openvino import package

    openvino = package()
    import nncf

    nncf.set_log_level(logging.ERROR)
    model = nncf.quantize(openvino.Core().read_model(str(float_file)), nncf.Dataset(images), subset_size=len(images))
    made = float_file.with_name("by_nncf.xml")
    openvino.save_model(model, str(made), compress_to_fp16=False)
    return made


PEERS = (
    Peer("onnxruntime", "onnxruntime", RUNTIMES_COMPARED, by_onnxruntime),
    Peer("nncf", "nncf", (RuntimeName.openvino,), by_nncf),
)


@dataclass(frozen=True)
class Candidate:
    """A file in one runtime. maker: qexp, float, or a peer's name."""

    maker: str
    runtime: RuntimeName
    file: Path

    @property
    def variant(self) -> Variant:
        """Its name in the timings."""
        precision = Precision.fp32 if self.maker == "float" else Precision.int8
        return Variant(precision, f"{self.maker}_in_{self.runtime}")

    def load(self) -> Loaded:
        return RUNTIMES[self.runtime].load(self.file, torch.nn.Identity, None)


def peers(outputs: str) -> None:
    """Print, for each network, accuracy, time and layers in INT8 of every quantizer's model in every runtime, and of
    qexp's fastest over the fastest of the others the ratio of times and the difference of accuracies."""
    for runtime in RUNTIMES_COMPARED:
        if reason := RUNTIMES[runtime].unavailable():
            print(f"The benchmark peers can't run: {reason}.")
            return
    installed = [peer for peer in PEERS if importlib.util.find_spec(peer.package) is not None]
    for peer in PEERS:
        if peer not in installed:
            print(f"{peer.name}'s quantizer is left out, as it is not installed: pip install 'qexp[peers]'")
    for network in chosen([BUILT_IN]):
        try:
            _compare(network, Path(outputs) / network.name, installed)
        except QexpError as error:
            print(f"{network.name}: {error}", file=sys.stderr)


def _compare(network: Network, folder: Path, installed: Sequence[Peer]) -> None:
    """Make every model of a network, evaluate and time them, and print what was found."""
    listed = f"runtimes=[{','.join(RUNTIMES_COMPARED)}]"
    config = composed(str(folder.parent), *network.settings, listed, "latency=standard", "latency.enabled=false")
    folder.mkdir()
    run_experiment(config, folder)
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    candidates = _made(config, data, folder / "model", installed)
    with protocol.threads(config.compute.threads):
        predictions = {one: _predictions(one, data, config.compute.threads) for one in candidates}
    timings = _timed(config, data, candidates)
    _print(network, data, predictions, timings)


def _predictions(one: Candidate, data: Data, threads: int) -> Predictions:
    """Its answers to all evaluation images, one at a time, by a copy on each thread."""
    model = one.load()
    copies = model.copies(threads - 1)
    return inference.predict(model, data.test, data.mean, data.std, 1, str(one.variant), copies=copies)


def _made(config: Config, data: Data, folder: Path, installed: Sequence[Peer]) -> list[Candidate]:
    """The float file, qexp's and each peer's, in the runtimes that execute it, all with a batch of 1."""
    float_file, own = (_with_one_image(folder / f"{precision}.onnx") for precision in Precision)
    pixels = data.train.drawn(draw(data.train, config.calib))
    images = [images_of(data, pixels[index : index + 1]).numpy() for index in range(len(pixels))]
    files: dict[str, tuple[Path, Sequence[RuntimeName]]] = {
        "float": (float_file, RUNTIMES_COMPARED),
        "qexp": (own, RUNTIMES_COMPARED),
    }
    for peer in installed:
        with contextlib.redirect_stdout(io.StringIO()):  # bars and hints
            files[peer.name] = peer.make(float_file, images), peer.runtimes
    return [Candidate(maker, runtime, file) for maker, (file, runtimes) in files.items() for runtime in runtimes]


def _with_one_image(path: Path) -> Path:
    """A copy of an ONNX file whose batch size is 1."""
    import onnx
    from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_dim_param_fixed

    model = onnx.load(str(path))
    make_dim_param_fixed(model.graph, onnx_file.BATCH, 1)
    fix_output_shapes(model)
    fixed = path.with_name(f"{path.stem}_batch1.onnx")
    onnx.save(model, str(fixed))
    return fixed


def _timed(config: Config, data: Data, candidates: Sequence[Candidate]) -> list[protocol.Timing]:
    """Timings of all candidates, side by side in PROCESSES fresh processes, one after the other."""
    inputs = images_of(data, data.test.pixels(np.arange(min(len(data.test), LATENCY_IMAGES))))
    found = []
    with machine_lock.timing(), multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for process in range(PROCESSES):
            found.append(fresh.apply(_time, (config, candidates, inputs.numpy(), process)))
    return [protocol.merged(of_variant) for of_variant in zip(*found, strict=True)]


def _time(config: Config, candidates: Sequence[Candidate], inputs: np.ndarray, process: int) -> list[protocol.Timing]:
    # All variants for the same number of rounds: no seconds beyond, in which only the fastest would be timed.
    settings = replace(config.latency, seconds=0, min_blocks=BLOCKS)
    threads = config.latency.threads[0]
    machine.pin(machine.separate_cores(threads))
    with protocol.threads(threads):
        return protocol.time_side_by_side(
            {one.variant: one.load() for one in candidates},
            torch.from_numpy(inputs),
            settings,
            seed=config.seed + process,
            control_among=[candidates[0].variant],
        )


def _print(
    network: Network, data: Data, predictions: Mapping[Candidate, Predictions], timings: Sequence[protocol.Timing]
) -> None:
    first = timings[0]
    shape = (1, *data.test.shape)
    print(f"\n{network.name}: {' '.join(network.settings)}")
    print(f"{len(data.test):,} evaluation images, batch 1, threads {first.threads}, {PROCESSES} processes")
    print(f"{'':28}{'p50 ms':>8} {'accuracy':>9}  layers in INT8, FP32")
    by = {one: next(t for t in timings if t.variant == one.variant and not t.control) for one in predictions}
    for one, found in predictions.items():
        layers = "{}, {}".format(*_layers(one, shape))
        name = f"{one.maker}, in {one.runtime}"
        print(f"{name:28}{by[one].summary.p50:8.3f} {found.correct.mean():9.4f}  {layers}")
    own = min((one for one in predictions if one.maker == "qexp"), key=lambda one: by[one].summary.p50)
    others = [one for one in predictions if one.maker not in ("qexp", "float")]
    best = min(others, key=lambda one: by[one].summary.p50)
    ratios = {one: protocol.speedup(by[own], by[one]) for one in others}
    for one in others:
        ratio, against = ratios[one], predictions[one]
        delta = statistics.tango(*statistics.discordant(against, predictions[own]))
        print(
            f"qexp in {own.runtime} over {one.maker} in {one.runtime}: time {ratio.value:.3f} "
            f"[{ratio.low:.3f}, {ratio.high:.3f}], accuracy {100 * delta.value:+.2f} points "
            f"[{100 * delta.low:+.2f}, {100 * delta.high:+.2f}]{', the fastest other' * (one is best)}"
        )
    delta = statistics.tango(*statistics.discordant(predictions[best], predictions[own]))
    holds = {"time": ratios[best].low <= GOAL, "accuracy": delta.high >= 0}
    said = ", ".join(f"{name} {'holds' if held else 'does not hold'}" for name, held in holds.items())
    print(f"the interval of the ratio of times reaches {GOAL}, accuracy is not shown to be lower: {said}")
    valid, reasons = protocol.validity(timings)
    if not valid:
        print(f"the times are not to be trusted: {'; '.join(reasons)}", flush=True)


def _layers(one: Candidate, shape: tuple[int, ...]) -> tuple[int, int]:
    """The layers that the runtime says it executes in INT8, and in FP32."""
    runtime: Any = RUNTIMES[one.runtime]
    int8, in_float = runtime.layers(one.file, shape)
    return int8, in_float
