"""The benchmarks' size: full, or with QEXP_BENCH_SIZE=smallest only enough to show that they still run."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def sized(full: T, smallest: T) -> T:
    """The value for the size that the environment sets, which a benchmark's child processes inherit."""
    return smallest if os.environ.get("QEXP_BENCH_SIZE") == "smallest" else full
