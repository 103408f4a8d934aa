from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qexp.config import schema
from qexp.errors import ConfigError
from qexp.latency import protocol as latency
from qexp.records import CUDA, Precision, Variant

FP32, INT8 = (Variant(precision, "eager") for precision in Precision)
FP32_TS, INT8_TS = (Variant(precision, "ts") for precision in Precision)
PROTOCOL = schema.Latency(
    enabled=True,
    processes=0,
    threads=[1],
    batch_sizes=[1],
    seconds=2.0,
    block_ms=50.0,
    warmup_calls=5,
    warmup_seconds=0.05,
    min_blocks=4,
    reuse=False,
)


class Simulated:
    """A machine whose clock moves only while a model is called: what is measured on it is exact, however busy this
    one is. slowdown: by what a call's duration is multiplied, given the seconds since the beginning."""

    def __init__(self, slowdown: Callable[[float], float] = lambda seconds: 1.0) -> None:
        self.now = 0
        self.slowdown = slowdown
        self.seen: dict[Variant, list[Any]] = {}

    def clock(self) -> int:
        return self.now

    def model(self, variant: Variant, ms: float, first: tuple[float, ...] = ()) -> Callable[[Any], None]:
        seen = self.seen.setdefault(variant, [])

        def call(batch: Any) -> None:
            duration = first[len(seen)] if len(seen) < len(first) else ms
            seen.append(batch)
            self.now += round(duration * self.slowdown(self.now / 1e9) * 1e6)

        return call

    def time(
        self,
        variants: dict[Variant, Callable[[Any], None]],
        protocol: schema.Latency = PROTOCOL,
        seed: int = 0,
        control_among: Collection[Variant] = (),
        batches: int = 7,
    ) -> list[latency.Timing]:
        return latency.time_blocks(
            variants,
            list(range(batches)),
            protocol,
            batch_size=1,
            threads=1,
            seed=seed,
            control_among=control_among,
            clock=self.clock,
        )


def pair(machine: Simulated, **kwargs: Any) -> list[latency.Timing]:
    return machine.time({FP32: machine.model(FP32, 5), INT8: machine.model(INT8, 10)}, **kwargs)


# ---- The protocol, on a simulated machine


def test_slow_first_calls_are_no_samples() -> None:
    machine = Simulated()
    (timing,) = machine.time({FP32: machine.model(FP32, 5, first=(200, 200, 200))})
    assert timing.first_ms == 200
    assert timing.samples.dtype == np.float32
    assert timing.summary.p50 == 5
    assert timing.samples.max() == 5


def test_int8_of_twice_the_time_is_a_speedup_of_a_half() -> None:
    fp32, int8 = pair(Simulated())
    ratio = latency.speedup(fp32, int8)
    assert (ratio.low, ratio.value, ratio.high) == (0.5, 0.5, 0.5)
    assert latency.speedup(int8, fp32).value == 2
    assert latency.fastest([int8, fp32]) is fp32


def test_a_machine_that_slows_down_steadily_changes_no_ratio() -> None:
    machine = Simulated(slowdown=lambda seconds: 1 + seconds / 4)
    fp32, int8 = pair(machine)
    assert fp32.block_ms[-1] > 1.4 * fp32.block_ms[0]
    # Within a round the slowdown is a straight line but for the second order.
    assert latency.speedup(fp32, int8).value == pytest.approx(0.5, rel=0.003)


def test_every_round_is_a_random_order_and_its_mirror() -> None:
    machine = Simulated()
    models = {variant: machine.model(variant, ms) for variant, ms in ((FP32, 3), (FP32_TS, 5), (INT8, 7))}
    timings = machine.time(models, replace(PROTOCOL, min_blocks=20))
    order = {
        int(position): (str(t.variant), int(r))
        for t in timings
        for position, r in zip(t.position, t.round, strict=True)
    }
    rounds = int(timings[0].round.max()) + 1
    assert sorted(order) == list(range(6 * rounds))
    names = [[order[6 * r + place][0] for place in range(6)] for r in range(rounds)]
    assert all(order[6 * r + place][1] == r for r in range(rounds) for place in range(6))
    assert all(row == row[::-1] and set(row[:3]) == set(map(str, models)) for row in names)
    assert len({tuple(row) for row in names}) > 1


def test_the_order_is_that_of_the_seed() -> None:
    first, again, other = (pair(Simulated(), seed=seed)[0].position.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_block_is_as_long_as_asked_for_and_no_longer() -> None:
    machine = Simulated()
    timings = machine.time(
        {(variant := Variant(Precision.fp32, str(ms))): machine.model(variant, ms) for ms in (0.01, 3, 49, 51, 700)},
        replace(PROTOCOL, seconds=0),
    )
    for timing in timings:
        calls = np.bincount(timing.block)
        assert len(set(calls)) == 1
        assert timing.wall_ms.min() >= 50
        assert calls[0] == 1 or timing.wall_ms.max() < 50 + float(timing.variant.runtime)
    assert [int(np.bincount(timing.block)[0]) for timing in timings] == [5000, 17, 2, 1, 1]


def test_an_interrupted_call_does_not_make_the_blocks_shorter() -> None:
    machine = Simulated()
    # The warm-up's five calls and one, then blocks of 2, 4 and so on; one of them is interrupted for 40 ms.
    (timing,) = machine.time({FP32: machine.model(FP32, 5, first=(5,) * 7 + (45,))})
    assert np.bincount(timing.block)[0] == 10


def test_every_call_of_every_block_is_kept() -> None:
    machine = Simulated()
    fp32, int8 = pair(machine)
    for timing, ms in ((fp32, 5), (int8, 10)):
        assert timing.samples.sum() == pytest.approx(timing.wall_ms.sum())
        assert (timing.samples == ms).all()
        assert len(timing.samples) == len(timing.block)
        assert len(timing.round) == len(timing.position) == len(timing.wall_ms) == timing.block[-1] + 1
        assert len(machine.seen[timing.variant]) > len(timing.samples)
        with pytest.raises(ValueError, match="read-only"):
            timing.samples[0] = 0


def test_calls_cycle_through_all_inputs() -> None:
    machine = Simulated()
    pair(machine, batches=7)
    for seen in machine.seen.values():
        assert seen == [index % 7 for index in range(len(seen))]


def test_rounds_go_on_for_the_seconds_and_the_blocks_asked_for() -> None:
    machine = Simulated()
    fp32, _ = pair(machine)
    assert fp32.round.max() + 1 >= 2.0 / (2 * (0.08 + 0.08))
    assert len(pair(Simulated(), protocol=replace(PROTOCOL, seconds=0))[0].round) == 4
    assert len(pair(Simulated(), protocol=replace(PROTOCOL, seconds=0, min_blocks=9))[0].round) == 10
    assert len(pair(Simulated(), protocol=replace(PROTOCOL, seconds=0, min_blocks=0))[0].round) == 2


SIX = {FP32: 7, FP32_TS: 5, Variant(Precision.fp32, CUDA): 1, INT8: 3, INT8_TS: 2}


def six(seconds: float = 4, int8_ts: float = 2) -> list[latency.Timing]:
    machine = Simulated()
    variants = {variant: machine.model(variant, ms) for variant, ms in {**SIX, INT8_TS: int8_ts}.items()}
    return machine.time(variants, replace(PROTOCOL, seconds=seconds), control_among=(FP32, FP32_TS))


def test_once_all_have_their_blocks_the_fastest_of_either_precision_go_on() -> None:
    timings = {timing.name: timing for timing in six()}
    blocks = {name: len(timing.round) for name, timing in timings.items()}
    assert {name for name, count in blocks.items() if count > PROTOCOL.min_blocks} == {"fp32_ts", "int8_ts", "control"}
    assert {blocks[name] for name in ("fp32_eager", "fp32_cuda", "int8_eager")} == {PROTOCOL.min_blocks}
    assert blocks["fp32_ts"] == blocks["int8_ts"] == blocks["control"]
    places = sorted(place for timing in timings.values() for place in timing.position.tolist())
    assert places == list(range(len(places)))
    assert latency.speedup(timings["fp32_eager"], timings["int8_ts"]).value == 3.5
    assert latency.speedup(timings["fp32_ts"], timings["int8_eager"]).value == pytest.approx(5 / 3)
    assert latency.validity(quiet(list(timings.values()))) == (True, ())


def test_processes_may_go_on_with_others() -> None:
    together = [latency.merged(pair) for pair in zip(six(), six(int8_ts=4), strict=True)]
    timings = {timing.name: timing for timing in together}
    fp32, eager, ts = (timings[name] for name in ("fp32_ts", "int8_eager", "int8_ts"))
    assert len(fp32.rounds) == len(np.union1d(eager.rounds, ts.rounds))
    assert set(np.intersect1d(eager.rounds, ts.rounds) >> 32) == {0, 1}
    # 5/2 in the whole of the first process, 5/4 in the common rounds of the second.
    assert latency.speedup(fp32, ts).value == 2.5
    assert latency.validity(quiet(together)) == (True, ())


def test_the_warm_up_is_of_calls_and_of_seconds() -> None:
    by_calls, by_seconds = Simulated(), Simulated()
    by_calls.time({FP32: by_calls.model(FP32, 100)}, replace(PROTOCOL, seconds=0, min_blocks=2))
    # Five calls, one for the block's size, two blocks that show no drift, two blocks.
    assert len(by_calls.seen[FP32]) == 5 + 1 + 2 + 2
    by_seconds.time({FP32: by_seconds.model(FP32, 100)}, replace(PROTOCOL, seconds=0, min_blocks=2, warmup_seconds=2))
    assert len(by_seconds.seen[FP32]) == 20 + 1 + 2 + 2


def test_the_warm_up_goes_on_while_the_time_drifts_but_not_for_ever() -> None:
    def calls(slowdown: Callable[[float], float]) -> int:
        machine = Simulated(slowdown)
        machine.time({FP32: machine.model(FP32, 100)}, replace(PROTOCOL, seconds=0, min_blocks=2))
        return len(machine.seen[FP32])

    steady = calls(lambda seconds: 1.0)
    assert steady < calls(lambda seconds: 1 + 5 * 3**-seconds) < steady + latency.BLOCKS_TO_STEADY - 1
    assert calls(lambda seconds: 1 + seconds) == steady + latency.BLOCKS_TO_STEADY - 1


def test_the_control_is_the_fastest_of_those_named_and_as_fast_as_itself() -> None:
    machine = Simulated()
    variants = {variant: machine.model(variant, ms) for variant, ms in ((FP32, 7), (FP32_TS, 5), (INT8_TS, 1))}
    *timings, control = machine.time(variants, control_among=(FP32, FP32_TS))
    assert [timing.variant for timing in timings] == list(variants)
    assert (control.variant, control.control, control.name) == (FP32_TS, True, "control")
    assert latency.speedup(timings[1], control) == replace(latency.speedup(timings[1], timings[1]), value=1.0)
    assert not any(timing.control for timing in timings)


def test_timings_of_two_measurements_have_no_speedup() -> None:
    fp32, _ = pair(Simulated())
    _, int8 = pair(Simulated())
    with pytest.raises(ValueError, match="fp32_eager and int8_eager were not timed side by side"):
        latency.speedup(fp32, int8)


# ---- Several processes


def test_what_two_processes_measured_is_merged_block_by_block() -> None:
    first, second = pair(Simulated()), pair(Simulated(slowdown=lambda seconds: 3.0), seed=1)
    fp32, int8 = (latency.merged([a, b]) for a, b in zip(first, second, strict=True))
    assert len(fp32.samples) == sum(len(timings[0].samples) for timings in (first, second))
    assert fp32.block_ms.tolist() == [*first[0].block_ms, *second[0].block_ms]
    assert fp32.round_ms.tolist() == [*first[0].round_ms, *second[0].round_ms]
    assert fp32.workers.tolist() == [0] * len(first[0].round_ms) + [1] * len(second[0].round_ms)
    assert fp32.conditions == (*first[0].conditions, *second[0].conditions)
    assert fp32.first_ms == 10.0  # the median of 5 and 15
    assert latency.speedup(fp32, int8).value == 0.5
    # A slow process is a slow process in both, not a drift.
    assert latency.validity(quiet([fp32, int8])) == (True, ())


def test_only_what_is_the_same_can_be_merged() -> None:
    _, int8, control = pair(Simulated(), control_among=[FP32])
    for others in ([], [int8, control], [control, replace(control, control=False)]):
        with pytest.raises(ValueError, match="only timings of one variant"):
            latency.merged(others)


def test_the_interval_of_a_speedup_resamples_processes_from_five_on() -> None:
    def measured(processes: int) -> list[latency.Timing]:
        runs = []
        for process in range(processes):
            machine = Simulated()
            runs.append(machine.time({FP32: machine.model(FP32, 5 + process), INT8: machine.model(INT8, 5)}))
        return [latency.merged([run[index] for run in runs]) for index in range(2)]

    few, many = (latency.speedup(*measured(processes)) for processes in (4, 5))
    assert few.method == "bootstrap of blocks within 4 workers"
    assert many.method == "bootstrap of workers, then blocks"
    assert many.value == pytest.approx(1.4)
    assert many.high - many.low > 0.3  # as far apart as the processes are


def test_saved_timings_are_read_back_as_they_were(tmp_path: Path) -> None:
    timings = [latency.merged([timing, timing]) for timing in pair(Simulated(), control_among=[FP32])]
    latency.save(timings, tmp_path / "timings.npz")
    for expected, actual in zip(timings, latency.load(tmp_path / "timings.npz"), strict=True):
        for field in fields(latency.Timing):
            before, after = getattr(expected, field.name), getattr(actual, field.name)
            if isinstance(before, np.ndarray):
                assert before.dtype == after.dtype
                assert before.tolist() == after.tolist()
            else:
                assert before == after


# ---- Whether to trust it


def quiet(timings: list[latency.Timing]) -> list[latency.Timing]:
    """The timings as a machine with nothing else to do would give them."""
    conditions = replace(timings[0].conditions[0], processors=8, busy_before=0.1, others=0.2, stolen=0.0)
    return [
        replace(t, cpu_ms=t.wall_ms * 0.999, switches=np.zeros_like(t.switches), conditions=(conditions,))
        for t in timings
    ]


@pytest.fixture
def trusted() -> list[latency.Timing]:
    machine = Simulated()
    variants = {FP32_TS: machine.model(FP32_TS, 5), INT8_TS: machine.model(INT8_TS, 1)}
    return quiet(machine.time(variants, control_among=[FP32_TS]))


def reasons(timings: list[latency.Timing]) -> str:
    valid, found = latency.validity(timings)
    assert valid == (not found)
    return "; ".join(found)


def test_a_quiet_machine_is_trusted(trusted: list[latency.Timing]) -> None:
    assert latency.validity(trusted) == (True, ())


def test_a_control_that_is_not_as_fast_as_itself_is_not_trusted(trusted: list[latency.Timing]) -> None:
    fp32, int8, control = trusted
    slower = replace(control, samples=control.samples * 1.02)
    assert reasons([fp32, int8, slower]) == "fp32_ts against itself gives 0.980 [0.980, 0.980], which leaves out 1"


def test_a_control_with_a_wide_interval_is_not_trusted(trusted: list[latency.Timing]) -> None:
    fp32, int8, control = trusted
    noise = np.where(np.arange(len(control.round)) % 4 < 2, 0.85, 1.2)
    noisy = replace(control, samples=control.samples * noise[control.block].astype(np.float32))
    assert "which is wider than 0.95 to 1.05" in reasons([fp32, int8, noisy])
    assert "leaves out 1" not in reasons([fp32, int8, noisy])


def test_late_blocks_are_not_trusted_where_they_are_more_than_a_few(trusted: list[latency.Timing]) -> None:
    fp32, *rest = trusted
    blocks = sum(len(timing.round) for timing in trusted)
    some = fp32.cpu_ms.copy()
    some[0] /= 1.5
    assert reasons([replace(fp32, cpu_ms=some), *rest]) == ""
    late = reasons([replace(fp32, cpu_ms=fp32.wall_ms / 1.06), *rest])
    assert late.startswith(f"in {len(fp32.round)} of {blocks} blocks the wall time exceeds")
    assert reasons([replace(fp32, cpu_ms=fp32.wall_ms / 1.04), *rest]) == ""


def test_context_switches_are_not_trusted(trusted: list[latency.Timing]) -> None:
    fp32, *rest = trusted
    preempted = replace(fp32, switches=np.full_like(fp32.switches, 30))
    assert "involuntary context switches a second" in reasons([preempted, *rest])


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("busy_before", "3.0 of 8 processors were busy before it began"),
        ("others", "3.0 of 8 processors were busy with other processes meanwhile"),
        ("stolen", "the hypervisor took 3.00 of 8 processors away"),
    ],
)
def test_a_busy_machine_is_not_trusted(trusted: list[latency.Timing], field: str, reason: str) -> None:
    conditions = replace(trusted[0].conditions[0], **{field: 3.0})
    assert reasons([replace(timing, conditions=(conditions,)) for timing in trusted]) == reason


def test_a_machine_that_does_not_tell_about_steal_is_not_accused(trusted: list[latency.Timing]) -> None:
    conditions = replace(trusted[0].conditions[0], stolen=None)
    assert reasons([replace(timing, conditions=(conditions,)) for timing in trusted]) == ""


def drifting() -> list[latency.Timing]:
    machine = Simulated()
    variants = {FP32_TS: machine.model(FP32_TS, 5), INT8_TS: machine.model(INT8_TS, 1, first=(1.5,) * 300)}
    return quiet(machine.time(variants, control_among=[FP32_TS]))


def test_a_warm_up_that_was_too_short_is_seen() -> None:
    assert re.fullmatch(r"int8_ts was \d\d% slower at first than later", reasons(drifting()))


def test_a_machine_that_slows_down_for_all_alike_is_not_taken_for_it() -> None:
    machine = Simulated(slowdown=lambda seconds: 1.3 if seconds < 1 else 1.0)
    variants = {FP32_TS: machine.model(FP32_TS, 5), INT8_TS: machine.model(INT8_TS, 1)}
    assert reasons(quiet(machine.time(variants, control_among=[FP32_TS]))) == ""


def test_a_warm_up_that_was_too_short_is_so_in_every_process(trusted: list[latency.Timing]) -> None:
    def together(*processes: list[latency.Timing]) -> list[latency.Timing]:
        return [latency.merged(timings) for timings in zip(*processes, strict=True)]

    assert "slower at first" in reasons(together(drifting(), drifting()))
    assert reasons(together(drifting(), trusted)) == ""


@pytest.mark.slow
def test_a_busy_loop_on_the_same_core_makes_a_measurement_invalid() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system can't pin a process to a core")
    before = os.sched_getaffinity(0)
    core = min(before)
    loop = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", loop, str(core)], stdout=subprocess.PIPE) as neighbour:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        os.sched_setaffinity(0, {core})
        try:
            timings = latency.time_blocks(
                {FP32: busy_ms(4), INT8: busy_ms(1)}, [0], PROTOCOL, batch_size=1, threads=1, control_among=[FP32]
            )
        finally:
            os.sched_setaffinity(0, before)
            neighbour.kill()
    found = reasons(timings)
    assert "something else ran on its core" in found
    assert "involuntary context switches" in found


def busy_ms(ms: float) -> Callable[[Any], None]:
    """A model that takes `ms` of processor time."""

    def call(batch: Any) -> None:
        end = time.thread_time_ns() + ms * 1e6
        while time.thread_time_ns() < end:
            pass

    return call


# ---- On this machine, with torch


def test_on_the_real_clock_slow_first_calls_are_left_out_and_the_ratio_is_found() -> None:
    calls = {FP32: 0, INT8: 0}

    def model(variant: Variant, ms: float) -> Callable[[torch.Tensor], None]:
        def call(images: torch.Tensor) -> None:
            calls[variant] += 1
            # Asleep and not at work: a process that wakes up is served at once, so this holds on a busy machine too.
            time.sleep(0.2 if calls[variant] <= 3 else ms / 1000)

        return call

    fp32, int8 = latency.time_side_by_side(
        {FP32: model(FP32, 5), INT8: model(INT8, 10)}, torch.zeros(3, 3, 4, 4), replace(PROTOCOL, block_ms=20)
    )
    assert fp32.first_ms >= 200
    assert 5 <= fp32.summary.p50 < 8
    assert latency.speedup(fp32, int8).value == pytest.approx(0.5, abs=0.1)
    assert fp32.started < fp32.ended


@pytest.mark.parametrize(("batch_size", "shapes"), [(1, 5), (2, 2), (5, 1), (8, 1)])
def test_models_are_called_with_batches_of_real_images_without_gradients(batch_size: int, shapes: int) -> None:
    images = torch.arange(5 * 3 * 2 * 2, dtype=torch.float32).reshape(5, 3, 2, 2)
    seen: set[tuple[float, ...]] = set()

    def model(batch: torch.Tensor) -> torch.Tensor:
        assert batch.shape == (batch_size, 3, 2, 2)
        assert batch.is_contiguous()
        assert torch.is_inference_mode_enabled()
        seen.add(tuple(batch[:, 0, 0, 0].tolist()))
        return batch * 2

    (timing,) = latency.time_side_by_side(
        {FP32: model}, images, replace(PROTOCOL, seconds=0, block_ms=1), batch_size=batch_size
    )
    assert (timing.batch_size, timing.threads) == (batch_size, torch.get_num_threads())
    assert len(seen) == shapes
    expected = [float(12 * (index % 5)) for index in range(batch_size * shapes)]
    assert sorted(value for batch in seen for value in batch) == sorted(expected)


def test_no_garbage_is_collected_meanwhile_and_the_setting_comes_back() -> None:
    enabled: list[bool] = []
    machine = Simulated()
    model = machine.model(FP32, 5)

    def call(batch: Any) -> None:
        enabled.append(gc.isenabled())
        model(batch)

    machine.time({FP32: call})
    assert set(enabled) == {False}
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        machine.time({FP32: lambda batch: 1 / 0})
    assert gc.isenabled()
    gc.disable()
    try:
        machine.time({FP32: model})
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_number_of_threads_is_set_and_set_back() -> None:
    before = torch.get_num_threads()
    with latency.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), latency.threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_more_threads_than_cores_are_refused() -> None:
    message = r"latency\.threads=\[1, 8\]: this process may use 2 cores; use numbers from 1 to 2\."
    with pytest.raises(ConfigError, match=message):
        latency.check_threads([1, 8], 2)
    latency.check_threads([1, 2], 2)


def test_reading_timings_needs_no_torch() -> None:
    modules = "qexp.latency.protocol, qexp.statistics, qexp.system.machine"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_protocols_are_complete_and_off_is_off(composed: Callable[..., schema.Config]) -> None:
    configs = [composed(f"latency={name}") for name in ("off", "quick", "standard", "publish")]
    _, quick, standard, publish = protocols = [config.latency for config in configs]
    assert [protocol.enabled for protocol in protocols] == [False, True, True, True]
    assert [protocol.processes for protocol in protocols] == [0, 0, 2, 5]
    assert quick.seconds < standard.seconds < publish.seconds
    runtimes = [config.runtimes for config in configs]
    assert runtimes[:3] == [composed().runtimes] * 3
    assert {*runtimes[3]} - {*runtimes[0]} == {schema.RuntimeName.inductor}
    assert composed().latency == standard
