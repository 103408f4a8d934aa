"""The metrics' names, which users' queries and charts depend on, and how their values are shown."""

from __future__ import annotations

import pickle

import pytest

from qexp.metrics import Metric, described

NAMES = """
accuracy/fp32 accuracy/int8 accuracy/delta
latency/fp32_ms latency/int8_ms latency/speedup
size/fp32_mb size/int8_mb size/ratio
uncertainty/delta_low uncertainty/delta_high uncertainty/speedup_low uncertainty/speedup_high
uncertainty/fp32_low uncertainty/fp32_high uncertainty/int8_low uncertainty/int8_high
uncertainty/mcnemar_p uncertainty/non_inferiority_p uncertainty/detectable
fidelity/agreement fidelity/kl fidelity/sqnr_db
runtime_accuracy/<runtime> runtime_agreement/<runtime>
runtime_speedup/<runtime> runtime_speedup/<runtime>_low runtime_speedup/<runtime>_high
runtime_layers/<runtime>_int8 runtime_layers/<runtime>_float
runtime_latency/<variant>_ms runtime_latency/<variant>_p90_ms runtime_latency/<variant>_p99_ms
runtime_compile/<variant>_s
discordant/images discordant/<runtime>_fp32_only discordant/<runtime>_int8_only
racing/images racing/all_images racing/<runtime>_fp32_only racing/<runtime>_int8_only
target/accuracy target/delta target/delta_low target/delta_high target/images
target/fp32_only target/int8_only
saturation/exact_accuracy saturation/exact_images
saturation/loss saturation/loss_low saturation/loss_high saturation/agreement saturation/sqnr_db saturation/layers
quant/layers_int8 quant/layers_float quant/layers_narrowed quant/batchnorm_left quant/fusion_difference
calib/images calib/seconds
machine/lock_wait_share
jobs/<status>
"""


def test_metrics_have_the_names_that_queries_and_charts_depend_on() -> None:
    assert {str(metric) for metric in Metric} == set(NAMES.split())


def test_every_name_of_a_metric_leads_to_its_entry() -> None:
    for metric in Metric:
        assert described(metric.of("int8_eager")) is metric
    assert described("accuracy/int8_x") is described("latency/int8_eager_ms") is None
    assert described("runtime_latency/int8_eager_channels_last_p90_ms") is Metric.runtime_latency_p90


def test_the_metrics_of_variants_are_read_back_by_variant() -> None:
    metrics = {
        Metric.runtime_latency.of("int8_eager"): 1.0,
        Metric.runtime_latency_p90.of("int8_eager"): 2.0,
        Metric.latency_int8: 1.0,
    }
    assert Metric.runtime_latency.within(metrics) == {"int8_eager": 1.0}
    assert Metric.runtime_latency_p90.within(metrics) == {"int8_eager": 2.0}
    counts = {Metric.images: 9.0, Metric.fp32_only.of("eager_channels_last"): 3.0, Metric.target_fp32_only: 4.0}
    assert Metric.fp32_only.within(counts) == {"eager_channels_last": 3.0}
    speedups = {Metric.runtime_speedup.of("eager"): 4.0, Metric.runtime_speedup_low.of("eager"): 3.0}
    assert Metric.runtime_speedup.within(speedups) == {"eager": 4.0}
    assert Metric.runtime_speedup_low.within(speedups) == {"eager": 3.0}


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        (Metric.accuracy_int8, 0.85, "0.8500"),
        (Metric.latency_int8, 4.904, "4.90"),
        (Metric.latency_int8, 0.0344, "0.034"),
        (Metric.latency_int8, 0.0, "0.00"),
        (Metric.layers_int8, 7.0, "7"),
        (Metric.size_int8, 0.0223, "0.022"),
    ],
)
def test_values_are_shown_with_the_metrics_digits(metric: Metric, value: float, text: str) -> None:
    assert metric.text(value) == text


def test_a_metric_survives_the_way_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(Metric.kl)) is Metric.kl
