"""Made-up studies whose images, timings and answers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qexp.config.schema import Report, ReportObjective
from qexp.metrics import Metric
from qexp.records import SAME_TAG, RunRecord, Top1, same_as_text
from qexp.report.study import Study, studies

TAGS = {
    "cpu": "a CPU", "isa": "avx512_vnni", "kernel_signature": "k", "data_digest": "d", "float_digest": "f",
    "accuracy_source": "executed", "saturation": "impossible", "latency_valid": "true",
}  # fmt: skip
PARAMS = {
    "target": "native", "qconfig": "per_channel", "observer": "minmax", "calib": "medium", "calib.batches": "32",
    "calib.seed": "0", "flow": "eager", "engine": "x86", "dataset.margin": "0.005", "evaluate.select_share": "0",
    "latency.batch_sizes": "[1]", "latency.threads": "[1]", "resolved.runtime": "eager",
}  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A run to be made: the images that INT8 breaks and mends, and a speedup with half of its interval's width.

    broken: images that FP32 alone has right, the first ones or those given; others: of further groups of runtimes, the
    images that each breaks.
    """

    name: str
    broken: int | Sequence[int] = 0
    speedup: float | None = 2.0
    half: float = 0.02
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    runtimes: Sequence[str] = ("eager", "torchscript")
    others: Mapping[str, tuple[int, float]] = field(default_factory=dict)


def question(objective: str = "fastest", **given: object) -> Report:
    """A report's settings, the defaults where none are given."""
    nothing = dict.fromkeys(("margin", "max_ms", "runtime", "batch_size", "threads"))
    return Report(auto=True, objective=ReportObjective(objective), **{**nothing, **given})  # type: ignore[arg-type]


def study(*planted: Planted, images: int = 10_000, mended: int = 0, top1: bool = True, share: float = 0) -> Study:
    """The study of these runs, of which each is right on `images` but the last tenth in FP32.

    mended: of the last tenth, the images that INT8 has right in every run.
    """
    records, classes = [], {}
    for number, one in enumerate(planted):
        record, found = made(one, images, mended)
        params = {**record.params, "evaluate.select_share": str(share)}
        records.append(replace(record, start=float(number), params=params))
        classes[record.run_id] = found
    found_studies = studies(records, classes if top1 else None)
    assert len(found_studies) == 1
    return found_studies[0]


def made(one: Planted, images: int, mended: int) -> tuple[RunRecord, Top1]:
    labels = np.zeros(images, dtype=np.int32)
    fp32 = labels.copy()
    fp32[-(images // 10) :] = 1
    groups = [(tuple(one.runtimes), one.broken, one.speedup)]
    groups += [((runtime,), broken, speedup) for runtime, (broken, speedup) in one.others.items()]
    int8, metrics = {}, {Metric.images: float(images), Metric.latency_fp32: 10.0, Metric.size_fp32: 40.0}
    metrics |= {Metric.size_int8: 10.0, Metric.calibration_images: 512.0, Metric.layers_int8: 20.0}
    for runtimes, broken, speedup in groups:
        right = fp32.copy()
        right[: broken if isinstance(broken, int) else 0] = 1
        if not isinstance(broken, int):
            right[list(broken)] = 1
        right[images - mended :] = 0
        for runtime in runtimes:
            int8[runtime] = right
            metrics[Metric.fp32_only.of(runtime)] = float(np.sum((fp32 == 0) & (right == 1)))
            metrics[Metric.int8_only.of(runtime)] = float(np.sum((fp32 == 1) & (right == 0)))
            # The runtimes of a group differ in speed too, the first being the fastest.
            ratio = None if speedup is None else speedup - 0.5 * runtimes.index(runtime)
            if ratio is not None:
                metrics[Metric.runtime_latency.of(f"int8_{runtime}")] = 10 / ratio
                metrics[Metric.runtime_speedup.of(runtime)] = ratio
                metrics[Metric.runtime_speedup_low.of(runtime)] = ratio - one.half
                metrics[Metric.runtime_speedup_high.of(runtime)] = ratio + one.half
    tags = {**TAGS, SAME_TAG: same_as_text([group for group, _, _ in groups]), **one.tags}
    record = RunRecord(
        one.name, one.name, "FINISHED", params={**PARAMS, **one.params}, metrics={**metrics, **one.metrics}, tags=tags
    )
    return record, Top1(labels, fp32, int8, ("right", "wrong"))
