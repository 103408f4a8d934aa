"""Settings that hold for a whole job (torch, the cache, the machine's lock), and the threads of its stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from qexp.config.schema import Config
from qexp.latency import protocol
from qexp.system import cache, machine_lock

# In small steps torch's other threads spin while they wait for work, which slows a job that runs at the same time.
small_steps = partial(protocol.threads, 1)


def analysing(config: Config) -> AbstractContextManager[None]:
    """The threads for the analysis: one in a sweep, where another job evaluates at the same time."""
    return protocol.threads(1 if config.sweep else config.compute.threads)


@contextmanager
def job_settings(config: Config) -> Iterator[None]:
    """Set threads, torch's generator and the cache's limit for this job, and restore them afterwards.

    While it computes, the job shares the machine with others, but with none that measures latency (see `machine_lock`).
    """
    bound = cache.bounded(config.cache.max_gb)
    with machine_lock.computing(), bound, protocol.threads(config.compute.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield
