"""A report of runs: the files in its folder, what a terminal prints of it, and what MLflow shows of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.config import schema
from qexp.records import PARENT_TAG, RunRecord
from qexp.report import evidence, formats, sentences, terminal, wording
from qexp.report.export import export
from qexp.report.findings import Findings, find
from qexp.report.next_commands import NextCommands
from qexp.system import credentials

if TYPE_CHECKING:
    from qexp.tracking.store import Store


@dataclass(frozen=True)
class Made:
    """A report. folder: its files; text: for a terminal; note: the recommendation and the table in Markdown."""

    folder: Path
    text: str
    note: str


def make(
    store: Store, records: Sequence[RunRecord], settings: schema.Report, folder: Path, name: str, source: str = ""
) -> Made:
    """Write the report of these runs into a folder, which is made.

    name: the report's title; source: the override that finds the same runs again, `sweep=ID`; by default the runs'
    common sweep or study.
    """
    exporting = store if settings.export else None
    return write(find(store, records, settings), records, folder, name, source or source_of(records), exporting)


def write(
    found: Sequence[Findings],
    records: Sequence[RunRecord],
    folder: Path,
    name: str,
    source: str,
    exporting: Store | None = None,
) -> Made:
    """Write the report of what was found, as `make` does. exporting: the runs' store, where what is recommended is to
    be exported too."""
    from qexp.report import html, page

    folder.mkdir(parents=True, exist_ok=True)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    commands = NextCommands(folder, source)
    whole = page.page(name, found, records, figures, commands)
    texts = {
        "report.html": html.render(whole),
        "runs.csv": evidence.runs_csv(records),
        "table.md": "\n\n".join(_headed(one, evidence.markdown(evidence.rows(one.headline))) for one in found) + "\n",
        "table.tex": "\n".join(
            f"% {wording.study(one.study)}\n{evidence.latex(evidence.rows(one.headline))}" for one in found
        ),
    }
    for file, text in texts.items():
        (folder / file).write_text(credentials.masked(text), encoding="utf-8")
    ships = export(found, commands, exporting) if exporting else terminal.export_command(found, commands)
    parts = [terminal.summary(found, formats.columns()), "\n".join([terminal.next_steps(commands), ships]).strip()]
    return Made(folder, "\n\n".join(parts), note(found, records))


def note(found: Sequence[Findings], records: Sequence[RunRecord]) -> str:
    """The recommendation and the table of the candidates that matter, in Markdown."""
    parts = []
    for one in found:
        rows = evidence.rows(one.headline)
        table = evidence.markdown(rows[: evidence.MOST], max(0, len(rows) - evidence.MOST)) if rows else ""
        parts.append(_headed(one, f"{' '.join(sentences.recommendation(one.headline))}\n\n{table}", len(found) > 1))
    missing = wording.missing(records)
    return "\n\n".join([*parts, missing] if missing else parts)


def _headed(found: Findings, text: str, headed: bool = True) -> str:
    return f"### {wording.study(found.study)}\n\n{text}" if headed else text


def source_of(records: Sequence[RunRecord]) -> str:
    """The override that finds these runs again; empty where they have nothing in common."""
    for setting, tag in (("sweep", PARENT_TAG), ("study", "study")):
        values = {record.tags.get(tag, "") for record in records}
        if len(values) == 1 and "" not in values:
            return f"{setting}={values.pop()}"
    return ""


def folder_name(title: str, sweep: str = "") -> str:
    """A title as the name of a folder. sweep: the id of the sweep that it is about, whose name another may have too."""
    name = re.sub(r"[^\w.=,+-]+", "_", title).strip("._")[:80] or "report"
    return f"{name}-{sweep[:8]}" if sweep else name


def sweep_of(records: Sequence[RunRecord]) -> str:
    """The id of the sweep that started all of these runs; empty where there is none."""
    return source_of(records).partition("sweep=")[2]
