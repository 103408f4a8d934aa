"""How much the benchmarks do: all of it, or as little as shows that they still run (QEXP_BENCH_SIZE=smallest)."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def sized(full: T, smallest: T) -> T:
    """The value for the size that the environment asks for, which processes started by a benchmark inherit."""
    return smallest if os.environ.get("QEXP_BENCH_SIZE") == "smallest" else full
