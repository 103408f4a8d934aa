"""What holds for all of a job: its settings of torch and of the cache, and its share of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qexp.config.schema import Config
from qexp.latency import protocol
from qexp.system import cache, lock


@contextmanager
def job_settings(config: Config) -> Iterator[None]:
    """Threads, torch's generator and the cache's bound set for this job and put back: nothing leaks into the next.

    Meanwhile the job shares the machine with others that compute, and with none that times (see system/lock.py).
    """
    bound = cache.bounded(config.cache.max_gb)
    with lock.computing(), bound, protocol.threads(config.compute.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield
