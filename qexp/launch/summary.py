"""The end of the output of a run or sweep: the tables, and where its files and MLflow are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.records import RunRecord
from qexp.report import tables
from qexp.report.study import finished
from qexp.system import credentials

# The tables of runs whose CPUs have the same kernels.
PARTS = (
    tables.runs, tables.latencies, tables.effects_table, tables.calibration_samples, tables.calibration_sizes,
)  # fmt: skip


def summary(records: Sequence[RunRecord]) -> str:
    """The tables of a sweep: machine and model, runs, effects of settings, and every job that failed.

    Runs on CPUs whose INT8 kernels return other values (the tag kernel_signature) are never pooled: each kind of CPU
    has its own tables.
    """
    alike: dict[str, list[RunRecord]] = {}
    for record in finished(records):
        alike.setdefault(record.tags.get("kernel_signature", ""), []).append(record)
    parts = [part(group) for group in alike.values() or [[]] for part in (shared, *PARTS)]
    return "\n\n".join(part for part in [*parts, tables.failures(records)] if part)


def shared(records: Sequence[RunRecord]) -> str:
    """A line above the tables that names the machine and the model."""
    tags = records[0].tags if records else {}
    return f"{tags['cpu']} ({tags['isa']}), torch {tags['torch']}; {tags['float_model']}" if "cpu" in tags else ""


def print_locations(folder: Path, ui: Any) -> None:
    """Print where the files are and how to open MLflow. ui: as `tracking.ui` returns it."""
    print(f"Files: {folder}")
    if ui.command:
        given = f", with the password for {credentials.MASK}" if credentials.MASK in ui.command else ""
        print(f"Compare in MLflow{given}:\n  {ui.command}\nand open {ui.url}")
    else:
        print(f"Compare in MLflow: {ui.url}")
