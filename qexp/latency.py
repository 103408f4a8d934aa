"""How long a call takes: the timing protocol, what it records, and what follows from the records.

All variants are timed side by side. A round holds two blocks of each, in random order and then in the mirrored order
(A B C C B A), so that a machine that slows down or speeds up steadily during a round does so for all variants alike.
A block is some calls of one variant in a row, at least `block_ms` long. Every call's duration is kept.

torch is imported only where threads are set and models are called.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qexp import config, stats
from qexp.errors import ConfigError
from qexp.results import Interval

if TYPE_CHECKING:
    from torch import Tensor

# torch.utils.benchmark.Timer finds a block's size in the same way, but keeps only the mean of each block, from which
# no percentile of calls follows.
MAX_CALLS_PER_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Timing:
    """What was measured of one variant at one batch size and number of threads.

    samples: float32 [calls], milliseconds of each call, in the order of the calls; block: int32 [calls], which block
    a call belongs to, from 0. Of each block: round: int32 [blocks]; position: int32 [blocks], its place among the
    blocks of all variants. first_ms: the very first call, which may compile; like all of the warm-up it is no sample.
    started, ended: seconds since the epoch, of the measurement of all variants with its warm-up.
    """

    variant: str
    batch_size: int
    threads: int
    samples: np.ndarray
    block: np.ndarray
    round: np.ndarray
    position: np.ndarray
    first_ms: float
    started: float
    ended: float

    @property
    def block_ms(self) -> np.ndarray:
        """float64 [blocks]: milliseconds a call, mean over the calls of each block."""
        return np.bincount(self.block, self.samples) / np.bincount(self.block)

    @property
    def round_ms(self) -> np.ndarray:
        """float64 [rounds]: milliseconds a call, mean over the two blocks of each round."""
        return np.bincount(self.round, self.block_ms) / np.bincount(self.round)

    @property
    def summary(self) -> stats.Summary:
        """Percentiles of the samples, in milliseconds."""
        return stats.summarise(self.samples)


def time_side_by_side(
    variants: Mapping[str, Callable[[Tensor], Any]],
    inputs: Tensor,
    protocol: config.Latency,
    *,
    batch_size: int = 1,
    seed: int = 0,
) -> list[Timing]:
    """Time the variants interleaved, in this process, with as many threads as torch has now (see `threads`).

    variants: callables by name, each taking float32 [batch_size, 3, H, W]; whatever one does to its input (another
    memory format, another device) is timed with it. inputs: float32 [images, 3, H, W]; calls cycle through all of
    them, as images or as batches. One Timing for each variant, in the order of `variants`.
    """
    import torch

    batches = make_batches(inputs, batch_size)
    with torch.inference_mode():
        return time_blocks(
            variants, batches, protocol, seed=seed, batch_size=batch_size, threads=torch.get_num_threads()
        )


def make_batches(inputs: Tensor, batch_size: int) -> list[Tensor]:
    """The inputs as batches of one size; what is left over is dropped, and too few images are repeated."""
    if len(inputs) < batch_size:
        inputs = inputs.repeat(-(-batch_size // len(inputs)), 1, 1, 1)
    count = len(inputs) // batch_size
    return [inputs[index * batch_size : (index + 1) * batch_size].contiguous() for index in range(count)]


def time_blocks(
    variants: Mapping[str, Callable[[Any], Any]],
    batches: Sequence[Any],
    protocol: config.Latency,
    *,
    seed: int,
    batch_size: int,
    threads: int,
) -> list[Timing]:
    """The protocol itself, for any callables: warm-up, block sizes, then rounds of blocks.

    Rounds go on until `protocol.seconds` are over and every variant has `protocol.min_blocks` blocks.
    """
    started = time.time()
    with no_gc():
        runners = [_Runner(call, batches) for call in variants.values()]
        for runner in runners:
            runner.warm_up(protocol)
        rng = np.random.default_rng(seed)
        deadline = time.monotonic() + protocol.seconds
        rounds = 0
        while time.monotonic() < deadline or 2 * rounds < protocol.min_blocks:
            order = list(rng.permutation(len(runners)))
            for place, index in enumerate(order + order[::-1]):
                runners[index].measure(rounds, 2 * rounds * len(runners) + place)
            rounds += 1
    ended = time.time()
    return [
        runner.timing(variant, batch_size, threads, started, ended)
        for variant, runner in zip(variants, runners, strict=True)
    ]


class _Runner:
    """One variant while it is timed: what it is called with next, how many calls are a block, what was measured."""

    def __init__(self, call: Callable[[Any], Any], batches: Sequence[Any]) -> None:
        self.call = call
        self.batches = batches
        self.next = 0
        self.calls = 1
        self.first_ms = 0.0
        self.durations: list[np.ndarray] = []
        self.rounds: list[int] = []
        self.positions: list[int] = []

    def run(self, calls: int) -> np.ndarray:
        """float64 [calls]: milliseconds of each of `calls` calls in a row."""
        call, clock = self.call, time.perf_counter_ns
        batches = [self.batches[index % len(self.batches)] for index in range(self.next, self.next + calls)]
        self.next += calls
        ticks = [0] * calls
        for index, batch in enumerate(batches):
            start = clock()
            call(batch)
            ticks[index] = clock() - start
        return np.array(ticks) / 1e6

    def warm_up(self, protocol: config.Latency) -> None:
        """Call it for `warmup_calls` calls and `warmup_seconds` at least, then find a block's size by doubling."""
        deadline = time.monotonic() + protocol.warmup_seconds
        self.first_ms = float(self.run(1)[0])
        done = 1
        while done < protocol.warmup_calls or time.monotonic() < deadline:
            self.run(1)
            done += 1
        # By the fastest call: one that was interrupted would make the block too short.
        while self.run(self.calls).min() * self.calls < protocol.block_ms and self.calls < MAX_CALLS_PER_BLOCK:
            self.calls *= 2

    def measure(self, round_: int, position: int) -> None:
        self.durations.append(self.run(self.calls))
        self.rounds.append(round_)
        self.positions.append(position)

    def timing(self, variant: str, batch_size: int, threads: int, started: float, ended: float) -> Timing:
        block = np.repeat(np.arange(len(self.durations)), [len(durations) for durations in self.durations])
        return Timing(
            variant=variant,
            batch_size=batch_size,
            threads=threads,
            samples=_read_only(np.concatenate(self.durations), np.float32),
            block=_read_only(block, np.int32),
            round=_read_only(np.array(self.rounds), np.int32),
            position=_read_only(np.array(self.positions), np.int32),
            first_ms=self.first_ms,
            started=started,
            ended=ended,
        )


def _read_only(values: np.ndarray, dtype: type) -> np.ndarray:
    array: np.ndarray = values.astype(dtype)
    array.flags.writeable = False
    return array


def fastest(timings: Sequence[Timing]) -> Timing:
    """The timing with the lowest p50."""
    return min(timings, key=lambda timing: timing.summary.p50)


def speedup(fp32: Timing, int8: Timing, confidence: float = 0.95) -> Interval:
    """How many times faster INT8 is: the median over rounds of FP32's time over INT8's, with a bootstrap interval.

    Raises ValueError where the two were not timed side by side.
    """
    if fp32.started != int8.started or not np.array_equal(fp32.round, int8.round):
        raise ValueError(f"{fp32.variant} and {int8.variant} were not timed side by side")
    return stats.median_ratio([fp32.round_ms / int8.round_ms], confidence)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's intra-op threads set to `count`, and set back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_gc() -> Iterator[None]:
    """Garbage collected once, and then not before the end: a collection would be counted as some call's time."""
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

    Threads that share a core are not what anybody ships, and their times say nothing.
    """
    if max(threads) > allowed:
        raise ConfigError(
            f"latency.threads={list(threads)}: this process may use {allowed} core{'s' * (allowed != 1)}; "
            f"use numbers from 1 to {allowed}."
        )
