"""The work of `python -m qexp.report`: it finds the runs, and writes the report that was asked for."""

from __future__ import annotations

from pathlib import Path

from qexp import tracking
from qexp.config.schema import ReportCommand
from qexp.report import comparison, files


def report(command: ReportCommand, cwd: Path) -> str:
    """Write the report and return what to print. cwd: the folder that relative paths were typed in.

    Raises InputError where there are no such runs, or the store can't be used.
    """
    outputs = Path(command.outputs)
    store = tracking.connect_existing(command.tracking, outputs, cwd)
    if command.compare is not None:
        first, second = command.compare
        return comparison.make(store, first, second, outputs / "reports", command.name).text
    tracking.close_orphans(store)  # or a sweep that was killed would seem to go on
    selected = tracking.find_runs(store, sweep=command.sweep, study=command.study, filter=command.filter)
    title = command.name or selected.name
    of_sweep = "" if command.name or command.study or command.filter else files.sweep_of(selected.records)
    folder = outputs / "reports" / files.folder_name(title, of_sweep)
    made = files.make(store, selected.records, command.report, folder, title, source(command))
    return made.text


def source(command: ReportCommand) -> str:
    """The override that names the runs; empty for the latest sweep."""
    given = {"sweep": command.sweep, "study": command.study, "filter": command.filter}
    return next((f"{name}={value}" for name, value in given.items() if value is not None), "")
