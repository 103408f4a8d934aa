"""The table of candidates: its order, why each is not the one to ship, and its forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from qexp.config import schema
from qexp.report import decision, evidence
from qexp.report.decision import Recommendation
from qexp.report.study import Study
from tests.helpers.rows import row
from tests.helpers.studies import grid, right, run, study

QUESTION = schema.Report(True, schema.ReportObjective.fastest, 0.03, None, None, None, None)
# The images that each setting loses of 1,000, and its speedup.
SETTINGS = {"a": (0, 2.0), "b": (0, 4.0), "c": (100, 8.0), "d": (25, 9.0), "e": (0, 0.5)}


def found(**changed: str) -> Recommendation:
    runs = [
        run(f"run {name}", right(*range(lost)), speedup, observer=changed.get(name, name))
        for name, (lost, speedup) in SETTINGS.items()
    ]
    return decision.recommend(study(runs), QUESTION)


def test_the_chosen_one_comes_first_and_each_other_says_why_not() -> None:
    rows = evidence.rows(found())
    assert [(row.name, row.word) for row in rows[:2]] == [("b", "ship"), ("a", "qualifies")]
    why = {row.name: row.why for row in rows}
    assert why["b"] == ""
    assert why["c"] == "shown to lose 3 points or more"
    assert why["d"] == "a loss is shown, and that it is less than 3 points is not"
    assert why["e"] == "not shown to be faster than FP32"


def test_figures_stand_with_their_intervals() -> None:
    first = evidence.rows(found())[0]
    assert first.points.startswith("+0.00 [-0.3")
    assert first.speedup == "4.00× [3.92, 4.08]"
    assert first.short.speedup == "4.00× ±0.08"
    assert "±" in first.short.points


def test_a_name_says_which_setting_a_bare_value_is_of_where_it_doesnt_tell() -> None:
    varied = {
        "qconfig__weight__scheme": ["symmetric", "asymmetric"],
        "calib__batches": ["1", "8"],
        "fusion": ["true", "false"],
    }
    names = [evidence.label(one) for one in decision.recommend(_grid(varied), QUESTION).candidates]
    assert names[0] == "symmetric batches=1 fusion=true"
    both = {
        "qconfig__weight__scheme": ["symmetric", "asymmetric"],
        "qconfig__activation__scheme": ["symmetric", "asymmetric"],
    }
    assert (
        evidence.label(decision.recommend(_grid(both), QUESTION).candidates[1]) == "scheme=symmetric scheme=asymmetric"
    )


def _grid(varied: dict[str, list[str]]) -> Study:
    return study([run(str(number), right(), 2.0, **one) for number, one in enumerate(grid(**varied))])


@pytest.mark.parametrize("name", ["a|b", "<script>alert(1)</script>", "100%_$x$ & {y} #1 ~ ^ \\"])
def test_names_cannot_break_a_table(name: str) -> None:
    rows = evidence.rows(found(b=name))
    lines = evidence.markdown(rows).splitlines()
    bars = {line.count("|") - line.count("\\|") for line in lines}
    assert len(bars) == 1
    assert "<script>" not in evidence.markdown(rows).replace("\\<script>", "")
    columns = len(evidence.columns(rows)) - 1  # without why not
    lines = [line for line in evidence.latex(rows).splitlines() if line.endswith(r"\\")]
    assert {line.count("&") - line.count(r"\&") for line in lines} == {columns - 1}


def test_latex_is_a_table_for_booktabs() -> None:
    text = evidence.latex(evidence.rows(found()))
    assert text.splitlines()[0].startswith("\\begin{tabular}{l")
    assert [line for line in text.splitlines() if line.endswith("rule")] == ["\\toprule", "\\midrule", "\\bottomrule"]
    assert "\\textbf{4.00$\\times$ [3.92, 4.08]}" in text


def test_the_rows_that_a_table_lacks_are_counted() -> None:
    rows = evidence.rows(found())
    assert evidence.markdown(rows[:2], 3).endswith("\n\nand 3 more candidates")
    assert "candidate" not in evidence.markdown(rows)


def test_every_run_is_a_line_of_the_csv(tmp_path: Path) -> None:
    records = [row("a, b", 0.8, x="1"), replace(row("c", 0.9, y="2"), status="FAILED", tags={"error": "too\nbad"})]
    (tmp_path / "runs.csv").write_text(evidence.runs_csv(records))
    read = pd.read_csv(tmp_path / "runs.csv")
    assert list(read["name"]) == ["a, b", "c"]
    assert list(read["status"]) == ["FINISHED", "FAILED"]
    assert list(read["accuracy/int8"]) == [0.8, 0.9]
    assert read["error"][1] == "too\nbad"
    assert {"x", "y"} <= set(read.columns)


def test_runtimes_that_answer_otherwise_are_candidates_of_their_own() -> None:
    answers = {"torchscript": right(), "onnxruntime": right(1, 2)}
    runs = [run(name, answers, {"torchscript": 2.0, "onnxruntime": 3.0}, observer=name) for name in "ab"]
    rows = evidence.rows(decision.recommend(study(runs), QUESTION))
    assert {row.name for row in rows} == {f"{name} in {runtime}" for name in "ab" for runtime in answers}
    assert "runtimes" in evidence.columns(rows)
    assert rows[0].name.endswith("onnxruntime")


def test_where_no_speed_is_known_a_candidate_qualifies_by_accuracy() -> None:
    runs = [run(name, right(*range(lost)), observer=name) for name, lost in (("a", 0), ("b", 0), ("c", 100))]
    rows = evidence.rows(decision.recommend(study(runs), QUESTION))
    assert [row.word for row in rows] == ["by accuracy", "by accuracy", "ruled out"]
    assert rows[0].mark == "chosen"
    assert rows[0].why == "qualifies by accuracy; there is no timing"
