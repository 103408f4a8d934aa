"""The report that a sweep makes when it ends: printed, written, and kept with its run in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.config.schema import Config
from qexp.records import RunRecord
from qexp.report import single_run
from qexp.report.study import finished, varied

if TYPE_CHECKING:
    from qexp.tracking.run import Run
    from qexp.tracking.store import Store

log = logging.getLogger(__name__)


def report(store: Store, parent: Run, rows: Sequence[RunRecord], config: Config) -> tuple[str, str | None]:
    """Make the report of a sweep's jobs, and keep it and a view of its runs with its own run.

    Returns what to print, and the view's key in MLflow, None where there is none. A report that fails is a warning in
    one sentence: it doesn't make the sweep fail.
    """
    if not finished(rows) and not any(row.raced_out for row in rows):
        return single_run.failures(rows), None
    from qexp import tracking

    try:
        said = _made(store, parent, rows, config)
    except Exception as error:
        again = f"python -m qexp.report sweep={parent.id}"
        log.warning("the report could not be made: %s; try it again with %s.", tracking.sentence(error), again)
        log.debug("", exc_info=True)
        said = "\n".join([*map(single_run.line, finished(rows)), single_run.failures(rows)]).strip()
    return said, tracking.save_view(store, parent, varied(finished(rows)))


def _made(store: Store, parent: Run, rows: Sequence[RunRecord], config: Config) -> str:
    from qexp import tracking
    from qexp.report import files, findings, formats, terminal

    found = findings.find(store, rows, config.report)
    note = files.note(found, rows)
    if not config.report.auto:
        tracking.describe_parent(parent, note)
        return terminal.summary(found, formats.columns())
    folder = Path(config.outputs) / "reports" / files.folder_name(parent.name, parent.id)
    exporting = store if config.report.export else None
    made = files.write(found, rows, folder, parent.name, f"sweep={parent.id}", exporting)
    tracking.describe_parent(parent, note, made.folder)
    return made.text
