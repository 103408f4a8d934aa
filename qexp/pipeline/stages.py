"""What holds for all of a job, its settings of torch and of the cache and its share of the machine, and the threads of
its stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from qexp.config.schema import Config
from qexp.latency import protocol
from qexp.system import cache, machine_lock

# Around small steps torch's other threads wait for work by spinning, which takes time from the job beside.
small_steps = partial(protocol.threads, 1)


def analysing(config: Config) -> AbstractContextManager[None]:
    """The threads with which a run is analysed: in a sweep another job evaluates meanwhile."""
    return protocol.threads(1 if config.sweep else config.compute.threads)


@contextmanager
def job_settings(config: Config) -> Iterator[None]:
    """Threads, torch's generator and the cache's bound set for this job and put back: nothing leaks into the next.

    Meanwhile the job shares the machine with others that compute, and with none that times (see `machine_lock`).
    """
    bound = cache.bounded(config.cache.max_gb)
    with machine_lock.computing(), bound, protocol.threads(config.compute.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield
