"""`python -m qexp` in tests."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


SMALL = ("model=tiny", "train=fast", "latency=off")


def runs(folder: Path) -> list[tuple[str, str]]:
    """(name, status) of every run in the store under folder/outputs; none where there is no store."""
    store = folder / "outputs" / "mlflow.db"
    if not store.exists():
        return []
    with sqlite3.connect(store) as connection:
        return connection.execute("select name, status from runs order by start_time").fetchall()
