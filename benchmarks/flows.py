"""Every flow, with each of its places to quantize, side by side in every runtime: accuracy, layers in INT8, latency.

    make bench BENCH=flows
    QEXP_BENCH_NETWORKS=FILE QEXP_BENCH_RESULTS=FOLDER make bench BENCH=flows

FILE names networks of one's own (see benchmarks/networks.py), with latency=off among their settings where only the
accuracies are asked for. FOLDER (outputs/benchmarks) keeps the results of each network and flow, as in BENCH=runtimes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.networks import Network, chosen
from benchmarks.runtimes import TIMING, Row, installed, once, results_folder
from benchmarks.size import sized
from benchmarks.speed import composed
from qexp import statistics
from qexp.config.schema import FlowName, RuntimeName
from qexp.metrics import Metric
from qexp.pipeline.run import run_experiment

BUILT_IN = sized(
    tuple(Network(name, (f"model={name}", "train=default")) for name in ("resnet20", "mobilenet_v2")),
    (Network("tiny", ("model=tiny",)),),
)
FLOWS = sized((FlowName.eager, FlowName.fx, FlowName.pt2e), (FlowName.fx,))
WANTED = sized(
    (RuntimeName.torchscript, RuntimeName.onnxruntime, RuntimeName.openvino, RuntimeName.inductor),
    (RuntimeName.torchscript, RuntimeName.onnxruntime),
)


def flows(outputs: str) -> None:
    """Print the table as Markdown, and a sentence for each network that a flow could not quantize."""
    folder, listed = results_folder(outputs), installed(WANTED)
    found = []
    for network in chosen(BUILT_IN):
        for flow, placement in ((one, placement) for one in FLOWS if not one.missing for placement in one.placements):
            of_flow = f"flow={flow}", f"qconfig.placement={placement}", f"runtimes=[{listed}]"
            way = Network(f"{network.name}_{flow}_{placement}", (*of_flow, *TIMING, *network.settings))
            found.append(once(way, folder, "flows", lambda way: _measured(way, folder, network.name)))  # noqa: B023
            print(f"{network.name}, {flow}, {placement}: {found[-1]['refused'] or 'measured'}", flush=True)
    print(f"\n{table([row for one in found for row in one['rows']])}\n")
    for one in found:
        if one["doubts"]:
            print(f"the times of {one['network']} are not to be trusted: {'; '.join(one['doubts'])}")


def _measured(way: Network, folder: Path, network: str) -> dict[str, Any]:
    config = composed(str(folder), *way.settings)
    run = folder / "runs" / way.name
    run.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = run_experiment(config, run)
    took = time.perf_counter() - started
    latency = json.loads((run / "latency.json").read_text()) if config.latency.enabled else {"validity": []}
    doubts = dict.fromkeys(reason for one in latency["validity"] for reason in one["reasons"])
    of_all = {"network": network, "flow": str(config.flow), "placement": str(config.qconfig.placement)}
    return {"rows": list(_rows(of_all, result.metrics, took)), "doubts": list(doubts)}


def _rows(of_all: Row, metrics: Mapping[str, float], took: float) -> Iterator[Row]:
    for runtime, accuracy in Metric.runtime_accuracy.within(metrics).items():
        one_right = (int(metrics[metric.of(runtime)]) for metric in (Metric.fp32_only, Metric.int8_only))
        loss = statistics.tango(*one_right, int(metrics[Metric.images]))
        int8 = metrics.get(Metric.runtime_layers_int8.of(runtime), metrics[Metric.layers_int8])
        in_float = metrics.get(Metric.runtime_layers_float.of(runtime), metrics[Metric.layers_float])
        latency = (metrics.get(Metric.runtime_latency.of(f"{precision}_{runtime}")) for precision in ("int8", "fp32"))
        yield {
            **of_all,
            "runtime": runtime,
            "accuracy": accuracy,
            "points to FP32 [95%]": f"{100 * loss.value:+.2f} [{100 * loss.low:+.2f}, {100 * loss.high:+.2f}]",
            "layers INT8 + FP32": f"{int8:.0f} + {in_float:.0f}",
            **dict(zip(("p50 ms", "FP32 p50 ms"), latency, strict=True)),
            "run, s": took,
        }


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table; an empty cell where there is no value."""
    if not rows:
        return "nothing was measured"
    digits = {"accuracy": ".4f", "p50 ms": ".3f", "FP32 p50 ms": ".3f", "run, s": ".0f"}
    formats = tuple(digits.get(name, "g") for name in rows[0])
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=formats, disable_numparse=[5, 6])
