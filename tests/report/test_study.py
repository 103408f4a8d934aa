"""Studies: runs are split so that nothing is compared that can't be, and timings are read from metrics or files."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.report import study, wording
from tests.helpers.rows import row


def made(name: str, cpu: str = "a", status: str = "FINISHED", **params: str) -> RunRecord:
    tags = {"cpu": cpu, "kernel_signature": "k", "data_digest": "d", "float_digest": "f"}
    return replace(row(name, 0.9, **{"target": "native", **params}), tags=tags, status=status)


def timed(record: RunRecord, **speedups: float) -> RunRecord:
    """The record with a speedup in each runtime, whose interval is a tenth to each side, and FP32 at 10 ms."""
    metrics: dict[str, float] = {**record.metrics, Metric.latency_fp32: 10.0}
    for runtime, ratio in speedups.items():
        metrics[Metric.runtime_speedup.of(runtime)] = ratio
        metrics[Metric.runtime_speedup_low.of(runtime)] = ratio - 0.1
        metrics[Metric.runtime_speedup_high.of(runtime)] = ratio + 0.1
        metrics[Metric.runtime_latency.of(f"int8_{runtime}")] = 10 / ratio
    return replace(record, metrics=metrics, tags={**record.tags, "latency_valid": "true"})


@pytest.mark.parametrize("tag", ["cpu", "kernel_signature", "data_digest", "float_digest"])
def test_figures_that_hold_for_something_else_are_another_study(tag: str) -> None:
    one, other = made("a"), made("b")
    other = replace(other, tags={**other.tags, tag: "other"})
    found = study.studies([one, other, made("c")])
    assert [[record.name for record in each.records] for each in found] == [["a", "c"], ["b"]]


def test_two_of_one_name_are_told_apart_by_what_differs() -> None:
    one, other = made("a"), made("b")
    other = replace(other, tags={**other.tags, "kernel_signature": "0123456789abcdef"})
    found = study.studies([one, other, made("c", "another CPU")])
    assert [each.apart for each in found] == ["INT8 kernels k", "INT8 kernels 01234567", ""]
    headings = [wording.study(each) for each in found]
    assert len(set(headings)) == 3
    assert headings[1] == f"{headings[2]}, INT8 kernels 01234567"
    assert [each.apart for each in study.studies([made("a"), made("b")])] == [""]


def test_what_two_hosts_of_one_machine_time_at_the_same_time_is_not_trusted() -> None:
    def on(name: str, host: str, boot: str, start: float, end: float | None) -> RunRecord:
        record = timed(made(name), eager=2.0)
        return replace(record, start=start, end=end, tags={**record.tags, "host": host, "boot": boot})

    runs = [
        on("first", "node1", "x", 0, 10), on("beside", "node2", "x", 5, None), on("before", "node3", "x", -9, -1),
        on("elsewhere", "node4", "y", 0, 10), on("same host", "node1", "x", -20, -10),
        timed(made("unknown"), eager=2.0),
    ]  # fmt: skip
    (found,) = study.studies(runs)
    against = {run.name: found.latencies[run.run_id][0].reasons for run in runs}
    assert {name: reasons for name, reasons in against.items() if reasons} == {
        "first": ("node2 ran at the same time, and is the same machine as node1",),
        "beside": ("node1 ran at the same time, and is the same machine as node2",),
    }


def test_the_cpu_that_is_meant_splits_too() -> None:
    assert len(study.studies([made("a"), made("b", target="avx2")])) == 2


def test_a_flow_that_no_target_has_an_effect_in_is_compared_with_what_ran_here() -> None:
    assert len(study.studies([made("a"), made("b", target="n/a")])) == 1
    assert len(study.studies([made("a", target="avx2"), made("b", target="n/a")])) == 2


def test_a_run_that_has_not_finished_goes_with_those_most_like_it() -> None:
    failed = replace(made("c", "b", "FAILED"), tags={"cpu": "b"})
    found = study.studies([made("a"), made("b", "b"), failed])
    assert [[record.name for record in each.records] for each in found] == [["a"], ["b", "c"]]
    assert [record.name for record in found[1].finished] == ["b"]
    assert [len(each.records) for each in study.studies([failed])] == [1]
    assert study.studies([]) == []


def test_a_seed_or_a_way_of_measuring_is_no_setting_and_what_was_executed_is() -> None:
    a = made("a", qconfig__overflow="none", resolved__overflow="none", calib__seed="0", latency__seconds="1")
    b = made("b", qconfig__overflow="auto", resolved__overflow="none", calib__seed="1", latency__seconds="5")
    c = made("c", qconfig__overflow="auto", resolved__overflow="weights", calib__seed="1", latency__seconds="5")
    assert study.same_setting(a) == study.same_setting(b) != study.same_setting(c)
    whole = study.studies([a, b, c])[0]
    assert whole.varied == ("qconfig.overflow",)
    assert whole.setting(c) == {"qconfig.overflow": "auto"}


def test_timings_are_read_from_metrics() -> None:
    record = timed(made("a", latency__batch_sizes="[8,1]", latency__threads="[2]"), eager=2.0, torchscript=4.0)
    whole = study.studies([record])[0]
    assert whole.conditions == ((8, 2),)
    found = whole.latency(record, "torchscript", (8, 2))
    assert found is not None
    assert (found.ms, found.fp32_ms, found.speedup.value, found.speedup.low) == (2.5, 10.0, 4.0, 3.9)
    assert found.valid
    assert found.log_half_width == pytest.approx(math.log(4.1 / 3.9) / 2)
    assert whole.latency(record, "torchscript", (1, 2)) is None
    assert study.of_metrics(made("b")) == ()


def test_a_timing_that_is_not_valid_says_why() -> None:
    record = timed(made("a"), eager=2.0)
    record = replace(record, tags={**record.tags, "latency_valid": "false", "latency_reason": "x was late; y was busy"})
    assert study.of_metrics(record)[0].reasons == ("x was late", "y was busy")


def test_timings_of_several_batch_sizes_are_read_from_the_file() -> None:
    def ratio(fp32: str, batch_size: int, value: float) -> dict[str, object]:
        names = {"fp32": fp32, "int8": "int8_eager", "batch_size": batch_size, "threads": 1}
        return {**names, "value": value, "low": value - 0.1, "high": value + 0.1, "confidence": 0.95, "method": "b"}

    p50s = {("fp32_eager", 1): 4.0, ("fp32_cuda", 1): 0.1, ("int8_eager", 1): 2.0, ("control", 1): 3.0}
    p50s |= {("fp32_eager", 8): 9.0, ("fp32_inductor", 8): 6.0, ("int8_eager", 8): 3.0}
    rows = [{"variant": name, "batch_size": size, "threads": 1, "p50": p50} for (name, size), p50 in p50s.items()]
    pairs = [ratio("fp32_eager", 1, 2), ratio("fp32_cuda", 1, 0.05), ratio("fp32_eager", 8, 3)]
    pairs += [ratio("fp32_inductor", 8, 2.1)]
    document = {"rows": rows, "speedups": pairs, "validity": [{"batch_size": 8, "threads": 1, "reasons": ["busy"]}]}
    record = timed(made("a"), eager=2.0)
    whole = study.studies([record], latency_files={"a": document})[0]
    assert whole.conditions == ((1, 1), (8, 1))
    found = whole.latencies["a"]
    assert [(one.ms, one.fp32_ms, one.speedup.value, one.reasons) for one in found] == [
        (2.0, 4.0, 2, ()),
        (3.0, 6.0, 2.1, ("busy",)),
    ]
