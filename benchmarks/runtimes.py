"""Every runtime's FP32 and INT8 model of several networks, side by side: accuracy, layers in INT8, latency, size,
load time and memory.

    make bench BENCH=runtimes
    QEXP_BENCH_NETWORKS=FILE QEXP_BENCH_RESULTS=FOLDER make bench BENCH=runtimes

FILE names networks of one's own (see benchmarks/networks.py). FOLDER (outputs/benchmarks) gets a file of results for
each network and flow; one that was made with the same settings, packages and processor isn't made again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tabulate import tabulate

from benchmarks.networks import Network, chosen
from benchmarks.size import sized
from benchmarks.speed import composed, high_water
from qexp import quantize
from qexp.config.schema import Config, FlowName, RuntimeName
from qexp.data.loading import load_data, normalise
from qexp.errors import QexpError
from qexp.latency import protocol
from qexp.metrics import Metric
from qexp.pipeline.run import run_experiment
from qexp.records import Precision, Result, Variant
from qexp.runtimes import RUNTIMES, saved_models
from qexp.system import machine, machine_lock

BUILT_IN = sized(
    tuple(
        Network(name, (f"model={name}", "train=default"))
        for name in ("resnet20", "mobilenet_v2", "googlenet", "shufflenet_v2", "resnet50")
    ),
    (Network("tiny", ("model=tiny",)),),
)
FLOWS = sized((FlowName.eager, FlowName.fx), (FlowName.eager,))
# inductor, which takes minutes to compile, where a network's settings name it.
WANTED = sized(
    tuple(name for name in RuntimeName if name is not RuntimeName.inductor),
    (RuntimeName.torchscript, RuntimeName.onnxruntime),
)
BATCH_SIZES = (1, 32)
TIMING = sized(("latency=standard",), ("latency=quick", "latency.seconds=0.1"))
RESULTS = "QEXP_BENCH_RESULTS"
ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, Any]


def results_folder(outputs: str) -> Path:
    """The folder of files with results, which later calls read."""
    return Path(os.environ.get(RESULTS) or sized(ROOT / "outputs" / "benchmarks", Path(outputs)))


def installed(wanted: Iterable[RuntimeName]) -> str:
    """The runtimes that are installed, with commas between them; print why the others are left out."""
    missing = {name: reason for name in wanted if (reason := RUNTIMES[name].unavailable())}
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    return ",".join(name for name in wanted if name not in missing)


def runtimes(outputs: str) -> None:
    """Print the table as Markdown, and a sentence for each network that a flow could not quantize."""
    folder, listed = results_folder(outputs), installed(WANTED)
    found = []
    for network in chosen(BUILT_IN):
        for flow in FLOWS:
            settings = (
                f"flow={flow}", f"runtimes=[{listed}]", *TIMING,
                f"latency.batch_sizes=[{','.join(map(str, BATCH_SIZES))}]", *network.settings,
            )  # fmt: skip
            way = Network(f"{network.name}_{flow}", settings)
            found.append(once(way, folder, "runtimes", lambda way: _measured(way, folder)))
            print(f"{network.name}, flow={flow}: {found[-1].get('refused') or 'measured'}", flush=True)
    rows = [row for one in found for row in one["rows"]]
    print(f"\n{table(rows)}\n")
    for one in found:
        if one["doubts"]:
            first, *others = one["doubts"]
            print(f"the times of {one['network']} are not to be trusted: {first}, and {len(others)} reasons more")


def once(network: Network, folder: Path, kind: str, measure: Callable[[Network], dict[str, Any]]) -> dict[str, Any]:
    """The results of one network in one flow, from the file that has them, or measured and written there.

    kind: the folder of such files within `folder`; measure: the rows, and the reasons against their timings.
    """
    path = folder / kind / f"{network.name}.json"
    here = machine.describe()
    versions = [RUNTIMES[name].version() for name in RuntimeName if not RUNTIMES[name].unavailable()]
    of = {
        "settings": list(network.settings),
        "cpu": here.cpu,
        "isa": here.isa,
        "packages": versions,
        "torch": torch.__version__,
    }
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["of"] == json.loads(json.dumps(of)):
            return kept
    made = {"network": network.name, "of": of, "rows": [], "doubts": [], "refused": ""}
    try:
        made |= measure(network)
    except QexpError as error:
        made["refused"] = str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")
    return made


def _measured(network: Network, folder: Path) -> dict[str, Any]:
    """The rows of one network in one flow, and the reasons against its timings."""
    config = composed(str(folder), *network.settings)
    run = folder / "runs" / network.name
    run.mkdir(parents=True, exist_ok=True)
    result = run_experiment(config, run)
    assert isinstance(result, Result)  # not stopped: nothing races here
    latency = json.loads((run / "latency.json").read_text())
    reasons = [reason for one in latency["validity"] for reason in one["reasons"]]
    return {"rows": list(_rows(config, run, result, latency["rows"])), "doubts": list(dict.fromkeys(reasons))}


def _rows(config: Config, run: Path, result: Result, timed: list[dict[str, Any]]) -> Iterator[Row]:
    artifacts = json.loads((run / "model" / "artifacts.json").read_text())
    sizes = {Variant(Precision(one["precision"]), one["runtime"]): one["bytes"] / 1e6 for one in artifacts}
    p50 = {(one["variant"], one["batch_size"]): one["p50"] for one in timed}
    network = run.name.removesuffix(f"_{config.flow}")
    for variant in saved_models.variants(config):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
            loaded = fresh.apply(load_afresh, (config, run, variant))
        yield {
            "network": network,
            "flow": str(config.flow),
            "runtime": str(variant.runtime),
            "precision": str(variant.precision),
            **_of_run(result.metrics, variant),
            **{f"p50 ms, batch {size}": p50[str(variant), size] for size in BATCH_SIZES},
            "size MB": sizes[variant],
            **loaded,
        }


def _of_run(metrics: Mapping[str, float], variant: Variant) -> Row:
    """Accuracy, agreement with the first runtime, and layers in INT8 and FP32, as a run has logged them.

    FP32 is evaluated once: a run is refused whose runtimes don't give the same FP32 logits.
    """
    if variant.precision is Precision.fp32:
        return {"accuracy": metrics[Metric.accuracy_fp32], "agreement": None, "layers INT8 + FP32": None}
    runtime = variant.runtime
    int8 = metrics.get(Metric.runtime_layers_int8.of(runtime), metrics[Metric.layers_int8])
    in_float = metrics.get(Metric.runtime_layers_float.of(runtime), metrics[Metric.layers_float])
    return {
        "accuracy": metrics[Metric.runtime_accuracy.of(runtime)],
        "agreement": metrics[Metric.runtime_agreement.of(runtime)],
        "layers INT8 + FP32": f"{int8:.0f} + {in_float:.0f}",
    }


def load_afresh(config: Config, run: Path, variant: Variant) -> Row:
    """In a fresh process: milliseconds from a saved model's file to its first answer, and the memory that the model,
    its library and answers at all BATCH_SIZES add to the process at most, in MB."""
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    pixels = data.test.pixels(np.resize(np.arange(len(data.test)), max(BATCH_SIZES)))
    images = normalise(pixels, data.mean, data.std)
    structures = saved_models.structures(config, run)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports and images, becomes today's size
    before = psutil.Process().memory_info().rss
    with machine_lock.timing(), protocol.threads(config.latency.threads[0]), quantize.engine(config.engine):
        started = time.perf_counter()
        model = saved_models.read(config, structures, run, [variant])[variant]
        model(images[:1])
        took = time.perf_counter() - started
        for size in BATCH_SIZES:
            model(images[:size])
    return {"load ms": 1000 * took, "memory MB": (high_water() - before) / 1e6}


DIGITS = {"accuracy": ".4f", "agreement": ".4f", "size MB": ".2f", "load ms": ".0f", "memory MB": ".0f"}


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table; an empty cell where there is no value."""
    if not rows:
        return "nothing was measured"
    formats = tuple(DIGITS.get(name, ".3f" if name.startswith("p50") else "g") for name in rows[0])
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=formats, disable_numparse=[6])
