"""Record the results that must not change when code is rebuilt: some twenty runs of the command line.

    python -m benchmarks.freeze before.json                       # at one commit
    python -m benchmarks.freeze after.json --against before.json  # at another, on the same machine
    python -m benchmarks.freeze after.json --against before.json --renamed renames.json

The file holds, for each run, digests of its logits and of its scales, its metrics but for timings, and the names and
values of params, the names of metrics, tags and files. Every run computes everything itself: nothing is read from a
cache. Takes some five minutes on two cores; the second form lists what differs, and ends with status 1 then.

The third form allows for renames in between. Its file maps former names to new ones, for each kind of
name: {"metrics": {"accuracy/kl": "fidelity/kl"}, "params": {}, "tags": {}}. A name that goes on as a part of others, as
in a new prefix, is written with an asterisk at its end, and so is what replaces it; null stands for a name that is
gone. "added" lists names (or their beginnings, with an asterisk) that are new: {"added": {"params": ["model.*"]}}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from tqdm import tqdm

from benchmarks.speed import TORCHS

RUNS = {
    "default": ["model=tiny"],
    "per_tensor": ["model=tiny", "qconfig=per_tensor"],
    "symmetric": ["model=resnet20", "qconfig=per_channel_symmetric"],
    "asymmetric_weights": ["model=resnet20", "qconfig=per_tensor_asymmetric", "engine=fbgemm"],
    "pytorch_default": ["model=resnet20", "qconfig=pytorch_default", "observer=histogram", "engine=fbgemm"],
    "moving_average": ["model=tiny", "observer=moving_average", "calib=small"],
    "percentile": ["model=resnet20", "observer=percentile", "calib.sampling=stratified"],
    "mse": ["model=resnet20", "observer=mse", "qconfig.weight.observer=mse", "calib.seed=3"],
    "entropy": ["model=resnet20", "observer=entropy", "flow=fx"],
    "fx": ["model=resnet18", "flow=fx"],
    "fx_onednn": ["model=mobilenet_v2", "flow=fx", "engine=onednn"],
    "fx_qnnpack": ["model=tiny", "flow=fx", "engine=qnnpack", "qconfig.range_after_clamp=false"],
    "eager_mobilenet": ["model=mobilenet_v2", "engine=onednn", "calib=small"],
    "unfused": ["model=resnet20", "fusion=false"],
    "dynamic": ["model=resnet18", "flow=dynamic"],
    "dynamic_onednn": ["model=tiny", "flow=dynamic", "engine=onednn"],
    "guard_weights": ["model=resnet20", "qconfig.overflow=weights"],
    "guard_activations": ["model=resnet20", "qconfig.overflow=activations", "flow=fx"],
    "guard_layers_avx2": ["model=resnet20", "qconfig.overflow=layers", "target=avx2"],
    "target_avx2": ["model=resnet20", "qconfig.overflow=none", "target=avx2", "saturation.emulated_images=200"],
    "target_vnni": ["model=resnet20", "flow=fx", "target=vnni"],
    "six_bits_of_weights": ["model=resnet20", "qconfig.weight.bits=6"],
    "four_bits_of_activations": ["model=resnet20", "qconfig.activation.bits=4", "flow=fx"],
    "timed": ["model=tiny", "latency=quick", "latency.seconds=0.05"],
}
TIMINGS = ("latency/", "runtime_latency/", "runtime_speedup/", "uncertainty/speedup", "calib/seconds", "machine/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the record is written")
    parser.add_argument("--against", type=Path, help="a record to compare with")
    parser.add_argument("--renamed", type=Path, help="names that were changed since that record was made")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help="some of the runs")
    arguments = parser.parse_args()
    record = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(arguments.only):
            record[name] = recorded(RUNS[name], Path(folder) / name, Path(folder) / "checkpoints")
    arguments.file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if arguments.against:
        before = json.loads(arguments.against.read_text())
        renames = json.loads(arguments.renamed.read_text()) if arguments.renamed else {}
        former = {name: renamed(before[name], renames) for name in record if name in before}
        found = list(
            differences(
                former, {name: without_added(one, former.get(name, one), renames) for name, one in record.items()}
            )
        )
        print("\n".join(found) or f"{len(record)} runs recorded the same")
        sys.exit(bool(found))


def recorded(overrides: list[str], outputs: Path, checkpoints: Path) -> dict[str, Any]:
    """Run `python -m qexp` with these overrides into `outputs`, and return what it left there and in its MLflow store.

    checkpoints: a folder of trained models that all runs share.
    """
    outputs.mkdir(parents=True)
    checkpoints.mkdir(exist_ok=True)
    (outputs / "checkpoints").symlink_to(checkpoints)
    quiet = [] if any(override.startswith("latency=") for override in overrides) else ["latency=off"]
    command = [sys.executable, "-m", "qexp", "train=fast", f"outputs={outputs}", TORCHS, *quiet, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    [folder] = (outputs / "runs").iterdir()
    predictions = np.load(folder / "predictions.npz")
    return {
        "logits": {name: digest(predictions[name].tobytes()) for name in ("fp32", "int8")},
        "scales": scales(json.loads((folder / "qparams.json").read_text())),
        "metrics": {name: value for name, value in run.data.metrics.items() if not name.startswith(TIMINGS)},
        "names of metrics": sorted(run.data.metrics),
        "params": run.data.params,
        "names of tags": sorted(name for name in run.data.tags if not name.startswith("mlflow.")),
        "files": sorted(files(client, run)),
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def scales(qparams: dict[str, Any]) -> dict[str, str]:
    """A digest of the parameters of each tensor."""
    return {name: digest(json.dumps(one, sort_keys=True).encode()) for name, one in qparams.items()}


def files(client: MlflowClient, run: Run, folder: str = "") -> Iterator[str]:
    """The paths of a run's artifacts."""
    for entry in client.list_artifacts(run.info.run_id, folder or None):
        if entry.is_dir:
            yield from files(client, run, entry.path)
        else:
            yield entry.path


# The parts of a record that hold names of one kind.
KINDS = {"metrics": "metrics", "names of metrics": "metrics", "params": "params", "names of tags": "tags"}


def renamed(record: dict[str, Any], renames: dict[str, Any]) -> dict[str, Any]:
    """The record of a run under the names that it would have today; see the module's text for `renames`."""
    result = dict(record)
    for part, kind in KINDS.items():
        names = {name: today(name, renames.get(kind, {})) for name in record[part]}
        if isinstance(record[part], dict):
            result[part] = {names[name]: value for name, value in record[part].items() if names[name] is not None}
        else:
            result[part] = sorted({name for name in names.values() if name is not None})
    return result


def today(name: str, renames: dict[str, str | None]) -> str | None:
    """Today's name for a former one, None where it is gone."""
    for former, new in renames.items():
        if former == name:
            return new
        if former.endswith("*") and name.startswith(former[:-1]):
            return new and new.removesuffix("*") + name.removeprefix(former[:-1])
    return name


def without_added(record: dict[str, Any], former: dict[str, Any], renames: dict[str, Any]) -> dict[str, Any]:
    """The record of a run without the names that are new, as far as the former record lacks them too."""
    result = dict(record)
    for part, kind in KINDS.items():
        new = renames.get("added", {}).get(kind, [])
        known = [n for n in record[part] if n in former[part] or not any(fnmatch(n, pattern) for pattern in new)]
        result[part] = {name: record[part][name] for name in known} if isinstance(record[part], dict) else known
    return result


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """A line for each value that is not the same in two records."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{where}: {key}" if where else key)
    elif isinstance(before, list) and isinstance(after, list):
        gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
        if gone or new:
            yield f"{where}: without {gone}, with {new}"
    elif before != after:
        yield f"{where}: {before} → {after}"


if __name__ == "__main__":
    main()
