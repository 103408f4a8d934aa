"""The timing protocol: latency of calls, measured side by side, and the speedups and validity that follow.

A round holds two blocks of each variant, in random order and then in the mirrored order (A B C C B A), so that a
machine that slows down or speeds up steadily during a round does so for all variants alike. A block is a number of
consecutive calls of one variant, at least `block_ms` long. Every call's duration is stored. Once all variants have
`min_blocks`, rounds go on with only the fastest of either precision, which the headline metrics compare.

Each block also records disturbances (processor time, context switches), from which `validity` concludes whether to
trust the timings; one variant can be timed twice, as its own control. Measurements of fresh processes, one after the
other (qexp/latency/worker.py), are merged: those within one process vary together, so the process is the unit that is
repeated.

torch is imported only where threads are set and models are called.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexp.config import schema
from qexp.errors import ConfigError
from qexp.records import Interval, Precision, Variant
from qexp.system import cpu_load

if TYPE_CHECKING:
    from torch import Tensor

    from qexp import statistics  # imported where it is used: processes that only measure latency need no scipy

# torch.utils.benchmark.Timer finds a block's size in the same way, but stores only the mean of each block, which has no
# percentiles of calls.
MAX_CALLS_PER_BLOCK = 1 << 20

# The sleep before a measurement, during which other processes' load is measured.
SECONDS_ASLEEP = 0.2

# The limits beyond which a measurement isn't trusted. For the control: the confidence of its interval, and how far that
# may reach to either side of 1.
CONTROL_CONFIDENCE = 0.99
CONTROL_WIDTH = 0.05
# A block whose wall time exceeds its thread's processor time by more than this is late; a few blocks in a hundred are
# everywhere, and move no median.
WALL_OVER_CPU = 0.05
LATE_BLOCKS = 0.05
SWITCHES_A_SECOND = 25
# The share of all processors that may be at work for others, and the processors that a hypervisor may take.
BUSY_SHARE = 0.25
STOLEN = 0.02
# A warm-up is over where two blocks in a row differ by less than this, or after so many blocks more.
STEADY = 0.05
BLOCKS_TO_STEADY = 4
# Of the first quarter of a variant's rounds against the rest.
DRIFT = 0.1


@dataclass(frozen=True)
class Conditions:
    """The load on the machine during the measurement of all variants.

    started, ended: seconds since the epoch, warm-up included. Processors on average, None where unknown: busy_before,
    busy just before, while this process slept; others, busy with other processes during the measurement; stolen, taken
    by a hypervisor during it. processors: their number.
    """

    started: float
    ended: float
    processors: int
    busy_before: float
    others: float
    stolen: float | None


@dataclass(frozen=True, eq=False)
class Timing:
    """The measurements of one variant at one batch size and number of threads, by one process or, merged, by several.

    samples: float32 [calls], milliseconds of each call, in the order of the calls; block: int32 [calls], the block
    of each call, from 0. For each block [blocks]: worker: int32, the process, from 0; round: int32, the round of
    that process, from 0; position: int32, its place among the blocks of all variants of its process; wall_ms, cpu_ms:
    float64, its duration and the processor time of the calling thread in it; switches: int32, involuntary context
    switches (of all threads where there are several). first_ms: the first call, a median over processes; like all of
    the warm-up it is no sample. conditions: of each process. control: True for the second timing of a variant, beside
    itself.
    """

    variant: Variant
    batch_size: int
    threads: int
    samples: np.ndarray
    block: np.ndarray
    worker: np.ndarray
    round: np.ndarray
    position: np.ndarray
    wall_ms: np.ndarray
    cpu_ms: np.ndarray
    switches: np.ndarray
    first_ms: float
    conditions: tuple[Conditions, ...]
    control: bool = False

    @property
    def name(self) -> str:
        """The variant's name, or `control`."""
        return "control" if self.control else str(self.variant)

    @property
    def started(self) -> float:
        """Seconds since the epoch at which the measurement of all variants began."""
        return self.conditions[0].started

    @property
    def ended(self) -> float:
        """Seconds since the epoch at which it ended."""
        return self.conditions[-1].ended

    @property
    def block_ms(self) -> np.ndarray:
        """float64 [blocks]: milliseconds a call, mean over the calls of each block."""
        return np.bincount(self.block, self.samples) / np.bincount(self.block)

    @property
    def round_ms(self) -> np.ndarray:
        """float64 [rounds]: milliseconds a call, mean over the two blocks of each round."""
        _, which = np.unique(self._round_ids, return_inverse=True)
        return np.bincount(which, self.block_ms) / np.bincount(which)

    @property
    def rounds(self) -> np.ndarray:
        """int64 [rounds]: a number for each round, the same for all variants that were timed in it."""
        return np.unique(self._round_ids)

    @property
    def workers(self) -> np.ndarray:
        """int64 [rounds]: the process of each round."""
        return self.rounds >> 32

    @property
    def _round_ids(self) -> np.ndarray:
        ids: np.ndarray = (self.worker.astype(np.int64) << 32) + self.round
        return ids

    @property
    def summary(self) -> statistics.Summary:
        """Percentiles of the samples, in milliseconds."""
        from qexp import statistics

        return statistics.summarise(self.samples)


def time_side_by_side(
    variants: Mapping[Variant, Callable[[Tensor], Any]],
    inputs: Tensor,
    protocol: schema.Latency,
    *,
    batch_size: int = 1,
    seed: int = 0,
    control_among: Collection[Variant] = (),
) -> list[Timing]:
    """Time the variants interleaved, in this process, with as many threads as torch has now (see `threads`).

    variants: callables, each taking float32 [batch_size, 3, H, W]; whatever one does to its input (another
    memory format, another device) is timed with it. inputs: float32 [images, 3, H, W]; calls cycle through all of
    them, as images or as batches. control_among: the fastest of these is timed twice, the second time as the control.
    One Timing for each variant, in the order of `variants`; the control, if any, comes last.
    """
    import torch

    batches = make_batches(inputs, batch_size)
    with torch.inference_mode():
        return time_blocks(
            variants,
            batches,
            protocol,
            batch_size=batch_size,
            threads=torch.get_num_threads(),
            seed=seed,
            control_among=control_among,
        )


def make_batches(inputs: Tensor, batch_size: int) -> list[Tensor]:
    """The inputs as batches of one size: a rest is dropped, too few images are repeated."""
    if len(inputs) < batch_size:
        inputs = inputs.repeat(-(-batch_size // len(inputs)), 1, 1, 1)
    count = len(inputs) // batch_size
    return [inputs[index * batch_size : (index + 1) * batch_size].contiguous() for index in range(count)]


def time_blocks(
    variants: Mapping[Variant, Callable[[Any], Any]],
    batches: Sequence[Any],
    protocol: schema.Latency,
    *,
    batch_size: int,
    threads: int,
    seed: int = 0,
    control_among: Collection[Variant] = (),
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[Timing]:
    """The protocol itself, for any callables: warm-up, block sizes, then rounds of blocks.

    Rounds go on until `protocol.seconds` are over and every variant has `protocol.min_blocks` blocks; those after that
    are of the contenders (see `_contenders`). clock: returns nanoseconds.
    """
    with no_gc():
        asleep = cpu_load.cpu_counters()
        time.sleep(SECONDS_ASLEEP)
        awake, started = cpu_load.cpu_counters(), time.time()
        runners = [_Runner(variant, call, batches, threads, clock) for variant, call in variants.items()]
        for runner in runners:
            runner.warm_up(protocol)
        if control_among:
            fastest_ = min((r for r in runners if r.variant in control_among), key=lambda runner: runner.estimate_ms)
            runners.append(fastest_.as_control())
        _rounds(runners, protocol, np.random.default_rng(seed), clock)
        ended, end = time.time(), cpu_load.cpu_counters()
    conditions = Conditions(
        started=started,
        ended=ended,
        processors=os.cpu_count() or 1,
        busy_before=cpu_load.others(asleep, awake),
        others=cpu_load.others(awake, end),
        stolen=cpu_load.stolen(awake, end),
    )
    return [runner.timing(batch_size, conditions) for runner in runners]


def fp32_on_cpu(variants: Collection[Variant]) -> list[Variant]:
    """The FP32 variants on the CPU, among which the control is chosen."""
    return [variant for variant in variants if variant.precision is Precision.fp32 and variant.on_cpu]


PER_CALL = ("samples", "block")
PER_BLOCK = ("worker", "round", "position", "wall_ms", "cpu_ms", "switches")
NOT_PLAIN = (*PER_CALL, *PER_BLOCK, "variant", "conditions")


def merged(workers: Sequence[Timing]) -> Timing:
    """The measurements of several processes of one variant as one Timing, in the order of the processes.

    Raises ValueError where there is none, or they are of different variants, batch sizes or numbers of threads.
    """
    if len({(w.variant, w.control, w.batch_size, w.threads) for w in workers}) != 1:
        raise ValueError("only timings of one variant, batch size and number of threads can be merged")
    # Counters that start at 0 in each process continue from one process to the next.
    before = {"block": np.cumsum([0, *(len(w.round) for w in workers)]), "worker": np.arange(len(workers))}

    def column(name: str) -> np.ndarray:
        parts = [getattr(w, name) for w in workers]
        shifted = [p + n for p, n in zip(parts, before[name], strict=False)] if name in before else parts
        return _read_only(np.concatenate(shifted), parts[0].dtype)

    columns: dict[str, Any] = {name: column(name) for name in (*PER_CALL, *PER_BLOCK)}
    return replace(
        workers[0],
        **columns,
        first_ms=float(np.median([w.first_ms for w in workers])),
        conditions=tuple(condition for w in workers for condition in w.conditions),
    )


def save(timings: Sequence[Timing], path: Path) -> None:
    """Write timings as one .npz, which `load` reads without unpickling anything."""
    arrays: dict[str, Any] = to_arrays(timings)
    np.savez(path, **arrays)


def load(path: Path) -> list[Timing]:
    """The timings that `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return from_arrays(file)


def to_arrays(timings: Sequence[Timing]) -> dict[str, np.ndarray]:
    """Timings as plain arrays by name, for `from_arrays`."""
    arrays = {f"{i}.{name}": getattr(t, name) for i, t in enumerate(timings) for name in (*PER_CALL, *PER_BLOCK)}
    plain = [
        {f.name: getattr(t, f.name) for f in fields(t) if f.name not in NOT_PLAIN}
        | {"variant": asdict(t.variant), "conditions": [asdict(condition) for condition in t.conditions]}
        for t in timings
    ]
    return {"plain": np.array(json.dumps(plain)), **arrays}


def from_arrays(arrays: Mapping[str, Any]) -> list[Timing]:
    """The timings of which `to_arrays` made these arrays."""
    return [
        Timing(
            **{name: arrays[f"{i}.{name}"] for name in (*PER_CALL, *PER_BLOCK)},
            variant=Variant(Precision(plain["variant"]["precision"]), plain.pop("variant")["runtime"]),
            conditions=tuple(Conditions(**values) for values in plain.pop("conditions")),
            **plain,
        )
        for i, plain in enumerate(json.loads(str(arrays["plain"])))
    ]


def _rounds(
    runners: Sequence[_Runner], protocol: schema.Latency, rng: np.random.Generator, clock: Callable[[], int]
) -> None:
    deadline = clock() + protocol.seconds * 1e9
    rounds = blocks = 0
    timed = runners
    while clock() < deadline or 2 * rounds < max(protocol.min_blocks, 1):
        if rounds and 2 * rounds >= protocol.min_blocks and timed is runners:
            timed = _contenders(runners)
        order = rng.permutation(len(timed)).tolist()
        for place, index in enumerate(order + order[::-1]):
            timed[index].measure(rounds, blocks + place)
        rounds, blocks = rounds + 1, blocks + 2 * len(timed)


def _contenders(runners: Sequence[_Runner]) -> Sequence[_Runner]:
    """The variants that the headline metrics compare: on the CPU the fastest of either precision so far, and the
    control with the variant that it repeats."""
    chosen = {runner.variant for runner in runners if runner.control}
    plain = [runner for runner in runners if not runner.control and runner.variant.on_cpu]
    for precision in {runner.variant.precision for runner in plain}:
        chosen.add(min((r for r in plain if r.variant.precision is precision), key=lambda runner: runner.p50).variant)
    return [runner for runner in runners if runner.variant in chosen]


class _Runner:
    """One variant while it is timed: the position in the batches, the calls per block, and the measurements so far."""

    def __init__(
        self,
        variant: Variant,
        call: Callable[[Any], Any],
        batches: Sequence[Any],
        threads: int,
        clock: Callable[[], int],
        control: bool = False,
    ) -> None:
        self.variant = variant
        self.call = call
        self.batches = batches
        self.threads = threads
        self.clock = clock
        self.next = 0
        self.calls = 1
        self.first_ms = 0.0
        self.estimate_ms = 0.0
        self.control = control
        self.durations: list[np.ndarray] = []
        self.blocks: list[tuple[int, int, float, float, int]] = []

    @property
    def p50(self) -> float:
        """The median of all calls so far, in milliseconds."""
        return float(np.median(np.concatenate(self.durations)))

    def as_control(self) -> _Runner:
        """A second runner of the same warm callable, with blocks of the same size."""
        second = _Runner(self.variant, self.call, self.batches, self.threads, self.clock, control=True)
        second.calls, second.first_ms = self.calls, self.first_ms
        return second

    def run(self, calls: int) -> np.ndarray:
        """float64 [calls]: milliseconds of each of `calls` calls in a row."""
        call, clock = self.call, self.clock
        batches = [self.batches[index % len(self.batches)] for index in range(self.next, self.next + calls)]
        self.next += calls
        ticks = [0] * calls
        for index, batch in enumerate(batches):
            start = clock()
            call(batch)
            ticks[index] = clock() - start
        return np.array(ticks) / 1e6

    def warm_up(self, protocol: schema.Latency) -> None:
        """Call it for `warmup_calls` calls and `warmup_seconds` at least, then find a block's size by doubling."""
        deadline = self.clock() + protocol.warmup_seconds * 1e9
        self.first_ms = float(self.run(1)[0])
        done = 1
        while done < protocol.warmup_calls or self.clock() < deadline:
            self.run(1)
            done += 1
        # By the fastest call: one that was interrupted would make the block too short.
        self.estimate_ms = float(self.run(1).min())
        while self.estimate_ms * self.calls < protocol.block_ms and self.calls < MAX_CALLS_PER_BLOCK:
            self.calls *= 2
            self.estimate_ms = float(self.run(self.calls).min())
        # Blocks as short as `block_ms` allows: in short rounds the machine's state is nearly the same for all variants.
        self.calls = min(self.calls, math.ceil(protocol.block_ms / self.estimate_ms))
        if protocol.warmup_seconds > 0:
            self._until_steady()

    def _until_steady(self) -> None:
        """Run blocks until two in a row take the same time, a few at most; `validity` finds a drift that goes on."""
        before = float(np.median(self.run(self.calls)))
        for _ in range(BLOCKS_TO_STEADY):
            now = float(np.median(self.run(self.calls)))
            if abs(now / before - 1) < STEADY:
                return
            before = now

    def measure(self, round_: int, position: int) -> None:
        """Time one block."""
        switches, cpu, wall = self._switches(), time.thread_time_ns(), self.clock()
        durations = self.run(self.calls)
        wall, cpu = self.clock() - wall, time.thread_time_ns() - cpu
        self.durations.append(durations)
        self.blocks.append((round_, position, wall / 1e6, cpu / 1e6, self._switches() - switches))

    def _switches(self) -> int:
        # Linux only; elsewhere all threads count.
        who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF) if self.threads == 1 else resource.RUSAGE_SELF
        return resource.getrusage(who).ru_nivcsw

    def timing(self, batch_size: int, conditions: Conditions) -> Timing:
        """The measurements as a Timing."""
        block = np.repeat(np.arange(len(self.durations)), [len(durations) for durations in self.durations])
        round_, position, wall, cpu, switches = (np.array(column) for column in zip(*self.blocks, strict=True))
        return Timing(
            variant=self.variant,
            batch_size=batch_size,
            threads=self.threads,
            samples=_read_only(np.concatenate(self.durations), np.float32),
            block=_read_only(block, np.int32),
            worker=_read_only(np.zeros(len(self.blocks)), np.int32),
            round=_read_only(round_, np.int32),
            position=_read_only(position, np.int32),
            wall_ms=_read_only(wall, np.float64),
            cpu_ms=_read_only(cpu, np.float64),
            switches=_read_only(switches, np.int32),
            first_ms=self.first_ms,
            conditions=(conditions,),
            control=self.control,
        )


def _read_only(values: np.ndarray, dtype: type) -> np.ndarray:
    array: np.ndarray = values.astype(dtype)
    array.flags.writeable = False
    return array


def fastest(timings: Sequence[Timing]) -> Timing:
    """The timing with the lowest p50."""
    return min(timings, key=lambda timing: timing.summary.p50)


def speedup(fp32: Timing, int8: Timing, confidence: float = 0.95) -> Interval:
    """INT8's speedup: the median over rounds of FP32's over INT8's time, with a bootstrap interval that resamples
    processes, then rounds (see `statistics.median_ratio`). Only rounds in which both were timed count.

    Raises ValueError where the two were not timed side by side.
    """
    if fp32.conditions != int8.conditions:
        raise ValueError(f"{fp32.variant} and {int8.variant} were not timed side by side")
    from qexp import statistics

    _, mine, others = np.intersect1d(fp32.rounds, int8.rounds, assume_unique=True, return_indices=True)
    ratios, workers = fp32.round_ms[mine] / int8.round_ms[others], fp32.workers[mine]
    return statistics.median_ratio([ratios[workers == worker] for worker in np.unique(workers)], confidence)


def pairs(timings: Sequence[Timing]) -> Iterator[tuple[Timing, Timing, Interval]]:
    """Every pair of an FP32 and an INT8 variant that were timed side by side, and its speedup."""
    variants = [timing for timing in timings if not timing.control]
    for fp32 in (timing for timing in variants if timing.variant.precision is Precision.fp32):
        for int8 in (timing for timing in variants if timing.variant.precision is Precision.int8):
            if (fp32.batch_size, fp32.threads) == (int8.batch_size, int8.threads):
                yield fp32, int8, speedup(fp32, int8)


def validity(timings: Sequence[Timing]) -> tuple[bool, tuple[str, ...]]:
    """True and () for a measurement that can be trusted; else False and every reason against it, a clause each.

    timings: all of one measurement, its control among them. The control alone can't show a steady disturbance, which
    slows both sides of every pair, so load and context switches are checked too.
    """
    of_machine = [reason for conditions in timings[0].conditions for reason in _of_machine(conditions)]
    reasons = dict.fromkeys([*_of_control(timings), *_of_blocks(timings), *of_machine])
    return not reasons, tuple(reasons)


def _of_control(timings: Sequence[Timing]) -> Iterator[str]:
    for control in (timing for timing in timings if timing.control):
        itself = next(timing for timing in timings if timing.variant == control.variant and not timing.control)
        ratio = speedup(itself, control, CONTROL_CONFIDENCE)
        stated = f"{control.variant} against itself gives {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        if not ratio.low <= 1 <= ratio.high:
            yield f"{stated}, which leaves out 1"
        if ratio.low < 1 - CONTROL_WIDTH or ratio.high > 1 + CONTROL_WIDTH:
            yield f"{stated}, which is wider than {1 - CONTROL_WIDTH:.2f} to {1 + CONTROL_WIDTH:.2f}"


def _of_blocks(timings: Sequence[Timing]) -> Iterator[str]:
    wall, cpu = (np.concatenate([getattr(timing, name) for timing in timings]) for name in ("wall_ms", "cpu_ms"))
    # With several threads the calling one waits for the others, now and then asleep.
    if timings[0].threads == 1:
        late = int(np.sum(wall > (1 + WALL_OVER_CPU) * cpu))
        if late > LATE_BLOCKS * len(wall):
            yield (
                f"in {late} of {len(wall)} blocks the wall time exceeds the thread's processor time by more than "
                f"{WALL_OVER_CPU:.0%}: something else ran on its core"
            )
    rate = sum(int(timing.switches.sum()) for timing in timings) / (wall.sum() / 1000)
    if rate > SWITCHES_A_SECOND:
        yield f"{rate:.0f} involuntary context switches a second: another process wanted the same core"
    # A change that all variants share is the machine's, and cancels out in every ratio: so each is compared with the
    # mean of those that were timed from the first round to the last.
    whole = max(len(timing.rounds) for timing in timings)
    throughout = [timing for timing in timings if len(timing.rounds) == whole]
    alike = np.exp(np.mean([np.log(timing.round_ms) for timing in throughout], axis=0))
    for timing in throughout:
        relative, workers = timing.round_ms / alike, timing.workers
        drifts = [_drift(relative[workers == worker]) for worker in np.unique(workers)]
        # A warm-up that isn't over shows in every process.
        drift = min(drifts, key=abs)
        if abs(drift) > DRIFT and len(set(np.sign(drifts))) == 1:
            yield f"{timing.name} was {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} at first than later"


def _drift(rounds: np.ndarray) -> float:
    """The first quarter of the rounds over the rest, by medians, minus 1: positive where it was slower."""
    first = max(len(rounds) // 4, 1)
    return float(np.median(rounds[:first]) / np.median(rounds[first:]) - 1) if len(rounds) > first else 0.0


def _of_machine(conditions: Conditions) -> Iterator[str]:
    limit = BUSY_SHARE * conditions.processors
    of_all = f"of {conditions.processors} processors"
    if conditions.busy_before > limit:
        yield f"{conditions.busy_before:.1f} {of_all} were busy before it began"
    if conditions.others > limit:
        yield f"{conditions.others:.1f} {of_all} were busy with other processes meanwhile"
    if conditions.stolen is not None and conditions.stolen > STOLEN:
        yield f"the hypervisor took {conditions.stolen:.2f} {of_all} away"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's intra-op threads to `count`, and restore them afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_gc() -> Iterator[None]:
    """Collect garbage once and disable collection until the end, since it would count as a call's time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_threads(threads: Sequence[int], allowed: int) -> None:
    """Raise ConfigError where more threads are asked for than can run at once (see `machine.allowed_cores`).

    Nobody ships threads that share a core, so their times would mean nothing.
    """
    if max(threads) > allowed:
        raise ConfigError(
            f"latency.threads={list(threads)}: this process may use {allowed} core{'s' * (allowed != 1)}; "
            f"use numbers from 1 to {allowed}."
        )
