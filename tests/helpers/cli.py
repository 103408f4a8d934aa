"""`python -m qexp` in tests."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


TORCHS = "runtimes=[eager,eager_channels_last,torchscript]"
"""For tests that are not about runtimes: to write ONNX files, as the default does, takes seconds."""
SMALL = ("model=tiny", "train=fast", "latency=off", TORCHS)


def in_torch(arguments: Iterable[str]) -> list[str]:
    """`TORCHS`, unless these arguments choose runtimes."""
    return (
        []
        if any(one.startswith(("runtimes=", "latency=publish", "experiment=ship")) for one in arguments)
        else [TORCHS]
    )


def runs(folder: Path) -> list[tuple[str, str]]:
    """(name, status) of every run in the store under folder/outputs; none where there is no store."""
    store = folder / "outputs" / "mlflow.db"
    if not store.exists():
        return []
    with sqlite3.connect(store) as connection:
        return connection.execute("select name, status from runs order by start_time").fetchall()
