"""Two runs side by side: the paired test on their predictions, the images they differ on, and their settings."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexp import statistics
from qexp.config import identity
from qexp.errors import InputError, QexpError
from qexp.metrics import Metric
from qexp.records import Interval, Predictions, RunRecord
from qexp.report import formats, html
from qexp.report.files import folder_name
from qexp.system import credentials

if TYPE_CHECKING:
    from qexp.tracking.store import Store

MOST_IMAGES = 60


@dataclass(frozen=True, eq=False)
class Compared:
    """Two runs on the same images. delta: INT8 accuracy of the second minus the first's, with Tango's 95% interval;
    p: exact McNemar; first_only, second_only: indices of images that one alone has right; both_wrong: of those that
    both have wrong, each as another class; settings: those that differ, with both values.
    """

    runs: tuple[RunRecord, RunRecord]
    int8: tuple[Predictions, Predictions]
    same_fp32: bool
    delta: Interval
    p: float
    first_only: np.ndarray
    second_only: np.ndarray
    both_wrong: np.ndarray
    settings: Mapping[str, tuple[str, str]]

    @property
    def differing(self) -> np.ndarray:
        """Indices of the images that get another class: those that one alone has right first."""
        return np.concatenate([self.first_only, self.second_only, self.both_wrong])


@dataclass(frozen=True)
class Made:
    """A comparison. file: its page; text: for a terminal."""

    file: Path
    text: str


def make(store: Store, first: str, second: str, reports: Path, name: str | None) -> Made:
    """Compare two runs by their ids, and write the page `compare.html`.

    Raises InputError where there is no such run, or where they aren't of the same images.
    """
    from qexp import tracking

    records = [tracking.find(store, run_id)[0] for run_id in (first, second)]
    stored = tracking.artifacts(store, records, "predictions.npz")
    configs = tracking.artifacts(store, records[:1], "config.json")
    found = compared((records[0], records[1]), [_arrays(one, stored) for one in records])
    classes, pictures, missing = _pictures(configs.get(first), found)
    folder = reports / folder_name(name or f"compare_{first[:8]}_{second[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "compare.html"
    file.write_text(credentials.masked(html.render(page(found, classes, pictures, missing))), encoding="utf-8")
    return Made(file, text(found, file, missing))


def _arrays(record: RunRecord, stored: Mapping[str, bytes]) -> Mapping[str, np.ndarray]:
    if record.run_id not in stored:
        raise InputError(
            f"compare: the run {record.name!r} ({record.run_id}), which is {record.status}, has no predictions.npz to "
            "compare; give two finished runs."
        )
    with np.load(io.BytesIO(stored[record.run_id]), allow_pickle=False) as arrays:
        return dict(arrays)


def compared(runs: tuple[RunRecord, RunRecord], arrays: Sequence[Mapping[str, np.ndarray]]) -> Compared:
    """The comparison of two runs, of the arrays of their predictions.npz. Raises InputError where images differ."""
    a, b = (Predictions(one["int8"], one["labels"], tuple(map(str, one["image_ids"]))) for one in arrays)
    if a.image_ids != b.image_ids or not np.array_equal(a.labels, b.labels):
        raise InputError(
            f"compare: {runs[0].name!r} has {len(a.labels):,} images and {runs[1].name!r} {len(b.labels):,}, and "
            "they are not the same ones in the same order; give two runs of one data set."
        )
    first_only, second_only, number = statistics.discordant(a, b)
    moved = a.logits.argmax(axis=1) != b.logits.argmax(axis=1)
    return Compared(
        runs,
        (a, b),
        bool(np.array_equal(arrays[0]["fp32"], arrays[1]["fp32"])),
        statistics.tango(first_only, second_only, number),
        statistics.mcnemar(first_only, second_only),
        np.flatnonzero(a.correct & ~b.correct),
        np.flatnonzero(b.correct & ~a.correct),
        np.flatnonzero(moved & ~a.correct & ~b.correct),
        differing_settings(*runs),
    )


def differing_settings(a: RunRecord, b: RunRecord) -> dict[str, tuple[str, str]]:
    """The params that differ, with both values; those that are resolved last."""
    names = sorted(dict.fromkeys([*a.params, *b.params]), key=lambda name: name.startswith("resolved."))
    pairs = {name: tuple(one.params.get(name, identity.NOT_APPLICABLE) for one in (a, b)) for name in names}
    return {name: (x, y) for name, (x, y) in pairs.items() if x != y}


def conclusion(found: Compared) -> str:
    """The paired test in a sentence."""
    first, second = (repr(one.name) for one in found.runs)
    figures = f"{formats.difference(found.delta)} points (95%, paired by image; McNemar p {formats.p_value(found.p)})"
    if found.delta.low <= 0 <= found.delta.high:
        return f"No difference in INT8 accuracy between {first} and {second} is shown: {figures}."
    better, worse = (second, first) if found.delta.value > 0 else (first, second)
    return f"{better} is shown to be more accurate in INT8 than {worse}; the second minus the first is {figures}."


def counted(found: Compared) -> str:
    """The number of images that get another class, in a sentence."""
    number, moved = len(found.int8[0].labels), len(found.differing)
    if not moved:
        return f"Both give all of {number:,} images the same class."
    first, second, wrong = (len(one) for one in (found.first_only, found.second_only, found.both_wrong))
    return (
        f"{moved:,} of {number:,} images get another class: {first:,} that only the first has right, {second:,} that "
        f"only the second has, and {wrong:,} that both have wrong."
    )


def _pictures(config: bytes | None, found: Compared) -> tuple[Sequence[str], dict[int, str], str]:
    """(names of classes, images as data URIs by their index, a sentence where they can't be had)."""
    wanted = found.differing[:MOST_IMAGES]
    if not len(wanted):
        return (), {}, ""
    if config is None:
        return (), {}, "The images are not shown: the first run has no config.json that names their data set."
    from qexp.data.loading import load_data  # torch, which nothing else of a report needs

    try:
        data = load_data(json.loads(config)["dataset"], None)
        position = {name: index for index, name in enumerate(data.test.ids)}
        places = [position[found.int8[0].image_ids[index]] for index in wanted]
        pixels = data.test.pixels(np.array(places))
    except (QexpError, KeyError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] if isinstance(error, QexpError) else "they are not in it any more"
        return (), {}, f"The images are not shown, since their data set can't be read: {reason.rstrip('.')}."
    return data.classes, {int(index): _png(image) for index, image in zip(wanted, pixels, strict=True)}, ""


def _png(pixels: np.ndarray) -> str:
    """An image, uint8 [3, H, W], as a data URI."""
    from PIL import Image

    out = io.BytesIO()
    image = Image.fromarray(np.moveaxis(pixels, 0, 2))
    image.thumbnail((160, 160))
    image.save(out, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def page(found: Compared, classes: Sequence[str], pictures: Mapping[int, str], missing: str) -> html.Page:
    """The page of a comparison. pictures: data URIs by the index of the image; missing: why there are none."""
    a, b = found.runs
    blocks = [
        html.Block("Figures", [_figures(found)]),
        html.Block("What differs in their settings", [_settings(found)]),
        html.Block("Images on which they differ", _images(found, classes, pictures, missing)),
    ]
    answer = html.Answer(
        "cant_tell" if found.delta.low <= 0 <= found.delta.high else "ship", [conclusion(found), counted(found)]
    )
    lead = [f"First: {a.name} ({a.run_id}). Second: {b.name} ({b.run_id})."]
    if not found.same_fp32:
        lead.append("Their float models differ, so the difference is not quantization's alone.")
    return html.Page("Two runs compared", lead, [html.Section("Comparison", answer, [], blocks)])


_COMPARED = (
    Metric.accuracy_fp32, Metric.accuracy_int8, Metric.accuracy_delta, Metric.latency_fp32, Metric.latency_int8,
    Metric.speedup, Metric.size_int8, Metric.sqnr, Metric.layers_int8,
)  # fmt: skip


def _figures(found: Compared) -> html.Table:
    rows = []
    for metric in _COMPARED:
        values = [one.metrics.get(metric) for one in found.runs]
        if any(value is not None for value in values):
            rows.append(
                [metric.meaning, *(formats.UNKNOWN if v is None else metric.text(v) for v in values), metric.unit]
            )
    return html.Table(["figure", "first", "second", "unit"], rows, frozenset({"first", "second"}))


def _settings(found: Compared) -> html.Table | html.Text:
    if not found.settings:
        return html.Text("Nothing: both have the same settings.")
    return html.Table(["setting", "first", "second"], [[name, *values] for name, values in found.settings.items()])


def _images(found: Compared, classes: Sequence[str], pictures: Mapping[int, str], missing: str) -> list[Any]:
    parts: list[Any] = [html.Text(missing)] if missing else []
    groups = {
        "Only the first is right": found.first_only,
        "Only the second is right": found.second_only,
        "Both are wrong, each in its own way": found.both_wrong,
    }
    left = MOST_IMAGES
    for heading, indices in groups.items():
        if len(indices):
            shown = indices[:left]
            left -= len(shown)
            more = f", of which {len(shown)} are shown" if len(shown) < len(indices) else ""
            parts.append(html.Text(f"{heading}: {formats.count(len(indices), 'image')}{more}."))
            if len(shown):
                parts.append(html.Sheet([_image(found, classes, pictures, int(index)) for index in shown]))
    return parts or [html.Text("None.")]


def _image(found: Compared, classes: Sequence[str], pictures: Mapping[int, str], index: int) -> tuple[str, list[str]]:
    def named(number: int) -> str:
        return str(classes[number]) if number < len(classes) else f"class {number}"

    a, b = (int(one.logits[index].argmax()) for one in found.int8)
    label = int(found.int8[0].labels[index])
    lines = [found.int8[0].image_ids[index], f"is {named(label)}", f"first: {named(a)}", f"second: {named(b)}"]
    return pictures.get(index, ""), lines


def text(found: Compared, file: Path, missing: str) -> str:
    """The comparison as lines for a terminal."""
    columns = formats.columns()
    said = [conclusion(found), counted(found), *([missing] if missing else [])]
    lines = [textwrap.fill(one, columns) for one in said]
    shown = list(found.settings.items())
    most = 12
    if shown:
        longest = max(len(name) for name, _ in shown[:most])
        lines.append("What differs in their settings:")
        lines += [formats.cut(f"  {name:<{longest}}  {a} → {b}", columns) for name, (a, b) in shown[:most]]
        lines += [f"  and {len(shown) - most:,} more"] if len(shown) > most else []
    return "\n".join([*lines, f"Comparison: {file}"])
