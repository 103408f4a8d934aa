"""A repetition of an earlier run, with its settings, compared with its results."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf.errors import OmegaConfBaseException
from tabulate import tabulate

from qexp.config import conversion, identity
from qexp.config.schema import Config
from qexp.errors import ConfigError, InputError
from qexp.launch.study import DEPENDS_ON
from qexp.metrics import Metric
from qexp.records import PRECISIONS, RunRecord
from qexp.report.accuracies import together
from qexp.system.credentials import MASK, masked, masked_tree

if TYPE_CHECKING:
    from qexp.launch.job import Job
    from qexp.tracking.store import Store

# Settings that may be given beside `rerun`: they say where a run is recorded, not what it computes.
BESIDE_RERUN = ("rerun", "outputs", "study", "tracking")


def check(job: Job) -> None:
    """Raise ConfigError where `rerun` is set in a sweep, or beside a setting that would make it another run."""
    rerun = job.config.rerun
    if rerun is None:
        return
    if not job.alone:
        raise ConfigError(f"rerun={rerun} repeats one run by itself, not in a sweep; leave out -m.")
    given = [f"{key}={value}" for key, value in job.overrides.items() if key.partition(".")[0] not in BESIDE_RERUN]
    others = [override for override in given if masked(override) == override]
    if others:
        raise ConfigError(
            f"rerun={rerun} repeats a run as it was, and {others[0]} would make it another; only outputs, study, "
            "tracking.* and credentials may be given with it."
        )


@dataclass(frozen=True, eq=False)
class EarlierRun:
    """A run that is to be repeated. job: the job that repeats it; row: its record in MLflow.

    predictions: the arrays of its `predictions.npz`, None where it has none; added: settings that its version of qexp
    did not have, with today's values.
    """

    job: Job
    row: RunRecord
    predictions: Mapping[str, np.ndarray] | None
    added: Mapping[str, Any]

    def compared(self, now: RunRecord) -> str:
        """Lines that say what has changed since, and how the figures differ."""
        then, started = self.row, time.strftime("%Y-%m-%d %H:%M", time.localtime(self.row.start))
        lines = [f"compared with {then.name!r} ({then.run_id}) of {started}, which is {then.status}:"]
        lines.append(comparison(then, now, self.predictions, _arrays(self.job.folder / "predictions.npz")))
        if self.added:
            given = ", ".join(f"{name}={value}" for name, value in self.added.items())
            lines.append(f"It did not know these settings, which are as this version has them: {given}.")
        return "\n".join(lines)


def find_earlier(store: Store, job: Job) -> EarlierRun | None:
    """The run that `job` is to repeat, or None where `rerun` is not set.

    Raises InputError where there is no such run or it can't be repeated.
    """
    from qexp import tracking

    rerun = job.config.rerun
    if rerun is None:
        return None
    check(job)
    row, experiment = tracking.find(store, rerun)
    if tracking.SWEEP_TAG in row.tags:
        raise InputError(f"rerun={rerun} is a whole sweep ({row.name!r}); give the id of one of the runs under it.")
    with tempfile.TemporaryDirectory(prefix="qexp-") as folder:
        file = tracking.fetch(store, rerun, "config.json", Path(folder))
        if file is None:
            raise InputError(
                f"rerun={rerun}: the run {row.name!r} has no artifact config.json to repeat it from; it is another "
                "tool's, or older than that."
            )
        recorded = file.read_text()
        predictions = tracking.fetch(store, rerun, "predictions.npz", Path(folder))
        arrays = _arrays(predictions) if predictions else None
    config, added = _recorded(rerun, recorded, job.config)
    name = job.config.tracking.name or row.name
    where = replace(job.config.tracking, experiment=store.experiment or experiment, name=name)
    config = replace(config, tracking=where, outputs=job.config.outputs, study=job.config.study, rerun=rerun)
    choices, overrides = _as_asked(row.params)
    return EarlierRun(replace(job, config=config, choices=choices, overrides=overrides), row, arrays, added)


def _recorded(rerun: str, text: str, now: Config) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run from its JSON text, and the settings that it lacked, which have today's values."""
    try:
        values, whole_now = json.loads(text), identity.exact(now)
        whole = _completed(values, whole_now)
        whole = {name: _with_credentials(rerun, value, whole_now.get(name), name) for name, value in whole.items()}
        config = conversion.from_plain(whole)
    except (ValueError, TypeError, AttributeError, ConfigError, OmegaConfBaseException) as error:
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise InputError(
            f"rerun={rerun}: this version of qexp can't take the configuration that the run has: {reason}."
        ) from error
    had = identity.flat(values)
    added = {name: value for name, value in identity.flat(whole).items() if name not in had}
    return config, {name: added[name] for name in added if name.partition(".")[0] not in identity.RECORDED_ONLY}


def _with_credentials(rerun: str, recorded: Any, now: Any, name: str) -> Any:
    """`recorded` with today's values where credentials were masked in it. name: the setting's."""
    if name in identity.RECORDED_ONLY:
        return recorded
    if isinstance(recorded, Mapping):
        given = now if isinstance(now, Mapping) else {}
        return {
            key: _with_credentials(rerun, value, given.get(key), f"{name}.{key}") for key, value in recorded.items()
        }
    if MASK not in str(recorded):
        return recorded
    if now is None or masked_tree(now, name.rpartition(".")[2]) != recorded:
        raise InputError(
            f"rerun={rerun}: {name}={recorded} was given with a credential, which qexp writes down nowhere; give "
            f"{name} again beside rerun."
        )
    return now


def _completed(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`recorded` with the settings that it lacks from `now`, except within `model` and `dataset` (open keys)."""
    result = dict(recorded)
    for name, value in now.items():
        if name not in recorded:
            result[name] = value
        elif isinstance(value, Mapping) and name not in ("model", "dataset"):
            result[name] = _completed(recorded[name], value)
    return result


def _as_asked(params: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Choices and overrides for which `identity.params` returns the same params again."""
    choices = {group: params.get(group, identity.NOT_APPLICABLE) for group in identity.GROUPS}
    changed = {f"{group}.": "" for group, choice in choices.items() if choice.endswith("*")}
    return {group: choice.removesuffix("*") for group, choice in choices.items()}, changed


def comparison(
    then: RunRecord,
    now: RunRecord,
    images_then: Mapping[str, np.ndarray] | None,
    images_now: Mapping[str, np.ndarray] | None,
) -> str:
    """Two runs of one configuration as a table: code, data and machine of each, and its figures.

    images: the arrays of `predictions.npz`, by name: labels [N], image_ids [N], logits `fp32` and `int8` [N, classes].
    """
    lines = []
    for tag, name in DEPENDS_ON.items():
        before, after = then.tags.get(tag, ""), now.tags.get(tag, "")
        lines.append([name, before or "?", after or "?", "" if before == after else "changed" if before else "unknown"])
    for precision, metric in zip(PRECISIONS, (Metric.accuracy_fp32, Metric.accuracy_int8), strict=True):
        values = [row.metrics.get(metric) for row in (then, now)]
        known = images_then is not None and images_now is not None
        told = images_told(images_then, images_now, precision) if known else ""  # type: ignore[arg-type]
        lines.append([f"accuracy {precision.upper()}", *("" if v is None else metric.text(v) for v in values), told])
    for precision, metric in zip(PRECISIONS, (Metric.latency_fp32, Metric.latency_int8), strict=True):
        both = [row.metrics[metric] for row in (then, now) if metric in row.metrics]
        if len(both) == 2:
            change = f"{100 * (both[1] / both[0] - 1):+.1f}%"
            shown = (f"{value:.{metric.digits + 1}f}" for value in both)
            lines.append([f"latency {precision.upper()}, {metric.unit}", *shown, change])
    intervals = [together(row, Metric.speedup, Metric.speedup_low, Metric.speedup_high) for row in (then, now)]
    if all(intervals):
        apart = max(low for _, low, _ in intervals) > min(high for *_, high in intervals)
        told = "the intervals are apart" if apart else "the intervals overlap"
        lines.append(["speedup [95%]", *("{:.2f}× [{:.2f}, {:.2f}]".format(*three) for three in intervals), told])
    return str(tabulate(lines, ["", "then", "now", ""], tablefmt="simple", disable_numparse=True))


def images_told(then: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray], precision: str) -> str:
    """Say on how many images the predictions of two runs differ."""
    same = all(np.array_equal(then[name], now[name]) for name in ("labels", "image_ids"))
    before, after = then[precision], now[precision]
    if not same or before.shape != after.shape:
        return "other images"
    broken = int((~np.isfinite(before)).any(axis=1).sum())
    if broken:  # the run is of an older version, which accepted such logits
        return f"{broken} of {len(before)} images had NaN or infinity as logits then"
    if np.array_equal(before, after):
        return "equal, the logits bit for bit"
    classes = before.argmax(axis=1), after.argmax(axis=1)
    moved = int((classes[0] != classes[1]).sum())
    if not moved:
        return "equal on every image, the logits not"
    gained = int((classes[1] == then["labels"]).sum()) - int((classes[0] == then["labels"]).sum())
    return f"{moved} of {len(before)} images answered otherwise, {gained:+d} right"


def _arrays(file: Path) -> dict[str, np.ndarray] | None:
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
