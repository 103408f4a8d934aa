"""The end of a sweep on a terminal: what fits where, and what is left out is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qexp.config import schema
from qexp.report import terminal, wording
from qexp.report.findings import Files, Findings, of_study
from qexp.report.next_commands import NextCommands
from tests.helpers.studies import grid, right, run, study

QUESTION = schema.Report(True, schema.ReportObjective.fastest, 0.02, None, None, None, None)


def sweep(count: int = 16, failed: int = 0) -> Findings:
    """Findings of `count` settings of four axes, of which one mattered, and of runs that failed."""
    axes = {
        "qconfig": ["per_channel", "per_tensor"],
        "observer": ["minmax", "mse"],
        "qconfig__activation__scheme": ["asymmetric", "symmetric"],
        "calib__batches": [str(2**n) for n in range((count + 7) // 8)],
    }
    runs = []
    for number, one in enumerate(grid(**axes)[:count]):
        lost = 60 if one["observer"] == "mse" else 0
        runs.append(run(" ".join(one.values()), right(*range(number % 3, lost)), 3 + number / 100, **one))
    made = study(runs)
    ended = [
        replace(
            made.records[0], run_id=f"f{n}", name=f"failed {n}", status="FAILED", metrics={}, tags={"error": "x " * 90}
        )
        for n in range(failed)
    ]
    return of_study(replace(made, records=(*made.records, *ended)), QUESTION, Files(None))


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_sweep_of_sixteen_runs_fits_on_a_screen(columns: int) -> None:
    found = sweep(failed=2)
    commands = NextCommands(Path("outputs/reports/a_sweep").absolute(), f"sweep={32 * 'a'}")
    after = [terminal.next_steps(commands), terminal.export_command([found], commands)]
    text = "\n".join([terminal.summary([found], columns), "", *after])
    where = ["", "Files: …", "Compare in MLflow:", "  mlflow ui …", "and open …"]
    assert len(text.splitlines()) + len(where) <= 40
    assert max(map(len, terminal.summary([found], columns).splitlines())) <= columns


def test_the_recommendation_comes_first_then_the_table_then_what_mattered() -> None:
    text = terminal.summary([sweep()], 100)
    places = [text.index(part) for part in ("Ship ", "setting ", "What mattered:", "observer ")]
    assert places == sorted(places)
    assert "observer  mse against minmax: points -5." in text
    assert "batches   " in text


def test_the_share_of_time_that_was_waited_for_the_lock_is_said_by_the_time_of_each_run() -> None:
    runs = [
        replace(one, start=0.0, end=seconds, metrics={"machine/lock_wait_share": share})
        for one, seconds, share in zip(sweep(2).study.records, (30.0, 10.0), (0.1, 0.9), strict=True)
    ]
    assert wording.lock_waits(runs) == "30% of the runs' time went to waiting for the machine's lock."
    assert wording.lock_waits([replace(runs[0], metrics={}), runs[1]]).startswith("90% ")
    assert wording.lock_waits([replace(runs[0], metrics={})]) == wording.lock_waits([]) == ""


def test_what_is_left_out_is_counted() -> None:
    text = terminal.summary([sweep(count=40, failed=5)], 80)
    assert "more candidates, in the report" in text
    assert "and 2 more runs that did not finish" in text


def test_a_name_that_is_too_long_loses_its_middle_and_no_figure() -> None:
    lines = terminal.summary([sweep()], 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert any("…" in line and "±" in line for line in lines)


def test_the_commands_that_come_next_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = sweep()
    commands = NextCommands(tmp_path / "outputs/reports/x", "sweep=abc")
    here = [*terminal.next_steps(commands).splitlines(), *terminal.export_command([found], commands).splitlines()]
    assert here[0] == "Report: outputs/reports/x/report.html"
    assert here[2] == "  python -m qexp.report sweep=abc report.margin=0.01"
    assert here[4].startswith("  python -m qexp.export 'run_id=")
    assert here[4].endswith(" format=torchscript")
    elsewhere = terminal.next_steps(NextCommands(tmp_path / "my runs/reports/x", "study=it's")).splitlines()
    assert elsewhere[2] == "  python -m qexp.report 'study=it'\"'\"'s' 'outputs=my runs' report.margin=0.01"


def test_a_sweep_without_a_finished_run_says_so() -> None:
    found = sweep(count=1, failed=1)
    nothing = of_study(
        replace(found.study, records=found.study.records[1:], latencies={}, top1={}), QUESTION, Files(None)
    )
    assert "No run has finished." in terminal.summary([nothing], 80)
