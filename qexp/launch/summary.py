"""The end of the output of a run or sweep: the tables, and where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.records import RunRecord
from qexp.report import effects, tables
from qexp.system import credentials

# Of what is said of runs on one kind of CPU.
PARTS = (
    tables.runs, tables.latencies, tables.effects_table, tables.calibration_samples, tables.calibration_sizes,
)  # fmt: skip


def summary(records: Sequence[RunRecord]) -> str:
    """The tables of a sweep: what all runs share, the runs, the effects, and every job that failed.

    CPUs whose INT8 kernels answer otherwise (the tag kernel_signature) are never pooled: each has its own tables.
    """
    alike: dict[str, list[RunRecord]] = {}
    for record in effects.finished(records):
        alike.setdefault(record.tags.get("kernel_signature", ""), []).append(record)
    parts = [part(group) for group in alike.values() or [[]] for part in (shared, *PARTS)]
    return "\n\n".join(part for part in [*parts, tables.failures(records)] if part)


def shared(records: Sequence[RunRecord]) -> str:
    """The machine and the model, once above the table."""
    tags = records[0].tags if records else {}
    return f"{tags['cpu']} ({tags['isa']}), torch {tags['torch']}; {tags['float_model']}" if "cpu" in tags else ""


def say_where(folder: Path, ui: Any) -> None:
    print(f"Files: {folder}")
    if ui.command:
        given = f", with the password for {credentials.MASK}" if credentials.MASK in ui.command else ""
        print(f"Compare in MLflow{given}:\n  {ui.command}\nand open {ui.url}")
    else:
        print(f"Compare in MLflow: {ui.url}")
