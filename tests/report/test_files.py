"""A whole report: its files, a page that loads nothing, and what it says of studies that are known by construction."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qexp import tracking
from qexp.config import schema
from qexp.records import Interval, RunRecord, Top1
from qexp.report import files, findings
from qexp.report.study import studies
from tests.helpers.simulated_sweep import simulated_sweep, write_sweep
from tests.helpers.stores import settings
from tests.helpers.studies import grid, right, run

QUESTION = schema.Report(True, schema.ReportObjective.fastest, 0.03, None, None, None, None)
SCRIPT = "<script>alert('x')</script>"

AXES = {"qconfig": ["per_channel", "per_tensor"], "observer": ["minmax", "mse"], "calib__seed": ["0", "1"]}

Runs = Sequence[tuple[RunRecord, Top1]]


def small(**changed: str) -> Runs:
    """Four settings and two calibration seeds of each; mse loses 60 of 1,000 images. changed: new values by old."""
    return [
        run(
            " ".join(one.values()), right(*range(60 if one["observer"] == "mse" else 0)), 3.0 + number % 3,
            **{name: changed.get(text, text) for name, text in one.items()},
        )
        for number, one in enumerate(grid(**AXES))
    ]  # fmt: skip


def made(folder: Path, runs: Runs, others: Sequence[RunRecord] = (), name: str = "a sweep") -> str:
    """Write the report of these runs, and of others without predictions; returns its page."""
    records = [*(record for record, _ in runs), *others]
    top1 = {record.run_id: classes for record, classes in runs}
    found = [findings.of_study(study, QUESTION, findings.Files(None)) for study in studies(records, top1)]
    written = files.write(found, records, folder, name, "sweep=abc")
    assert written.folder == folder
    return (folder / "report.html").read_text()


class Read(HTMLParser):
    """What a page is made of: its elements with their attributes, and its text without scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        self.text += "" if self._inside else f"{data} "


def test_every_file_of_a_report_is_there_and_can_be_read(tmp_path: Path) -> None:
    made(tmp_path, small())
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "runs.csv", "table.md", "table.tex", "figures"}
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"front", "effects", "classes", "interaction1"} <= names
    for name in names:
        assert (tmp_path / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    page = Read(made(tmp_path, small()))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not attributes.keys() & {"src", "srcset", "background", "action", "ping"}
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith(("#", "data:"))
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(one["content"] for tag, one in page.elements if one.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    assert sum(map(len, scripts)) <= 200_000


def test_a_run_that_is_named_as_a_script_stays_text(tmp_path: Path) -> None:
    runs = [(replace(record, name=f"{SCRIPT} {record.name}"), top1) for record, top1 in small(minmax=SCRIPT)]
    failed = replace(runs[0][0], run_id="f", name=SCRIPT, status="FAILED", metrics={}, tags={"error": SCRIPT})
    page = made(tmp_path, runs, [failed], name=SCRIPT)
    read = Read(page)
    assert "alert('x')" not in "".join(re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL))
    assert sum(tag == "script" for tag, _ in read.elements) == 3  # the plot's data, its library, and what draws it
    assert read.text.count(SCRIPT) >= 3
    assert SCRIPT not in (tmp_path / "table.md").read_text()


def test_the_page_says_first_what_to_ship_and_its_figures(tmp_path: Path) -> None:
    text = " ".join(Read(made(tmp_path, small())).text.split())
    assert text.index("Ship ") < text.index("Recommendation")
    assert "adjusted p" in text
    assert "observer: against minmax, accuracy: mse -6.00" in text
    assert "qconfig: against per_channel, accuracy: the same; speed: " in text
    assert "Holm" in text


def test_runs_of_two_machines_have_a_section_each(tmp_path: Path) -> None:
    here = small()
    there = [
        (replace(record, run_id=f"b{record.run_id}", tags={**record.tags, "cpu": "b"}), top1) for record, top1 in here
    ]
    page = Read(made(tmp_path, [*here, *there]))
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == ["study-1", "study-2"]
    assert "whose figures can't be compared" in page.text
    assert {"front-1.svg", "front-2.svg"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    assert (tmp_path / "table.md").read_text().count("| setting") == 2


def test_a_sweep_that_goes_on_or_was_killed_says_what_is_missing(tmp_path: Path) -> None:
    first = small()[0][0]
    others = [
        replace(first, run_id=f"{status}{n}", name=f"{status} {n}", status=status, metrics={}, tags={"error": "bad."})
        for status, number in (("RUNNING", 2), ("KILLED", 1), ("FAILED", 1))
        for n in range(number)
    ]  # fmt: skip
    text = " ".join(Read(made(tmp_path, small(), others)).text.split())
    assert "What is missing: 2 still running, 1 failed, 1 stopped, of 12 runs; make the report again" in text
    assert "FAILED 0: bad." in text
    nothing = Read(made(tmp_path / "nothing", [], others)).text
    assert "No run has finished" in nothing


def test_one_run_is_a_report_too(tmp_path: Path) -> None:
    text = Read(made(tmp_path, small()[:1])).text
    assert "Nothing varied among the finished runs" in text
    assert "Ship " in text


def test_each_batch_size_that_was_timed_has_its_recommendation(tmp_path: Path) -> None:
    runs = small()
    (one,) = studies([record for record, _ in runs], {record.run_id: top1 for record, top1 in runs})
    timed = {
        run_id: (
            *found,
            *(replace(latency, batch_size=8, speedup=Interval(0.5, 0.4, 0.6, 0.95, "")) for latency in found),
        )
        for run_id, found in one.latencies.items()
    }
    found = findings.of_study(replace(one, latencies=timed), QUESTION, findings.Files(None))
    files.write([found], one.records, tmp_path, "several", "")
    text = Read((tmp_path / "report.html").read_text()).text
    assert "Ship " in text
    assert "At batch size 8 with 1 thread: Stay on FP32" in text


def test_without_a_timing_there_is_no_front_and_the_report_says_so(tmp_path: Path) -> None:
    runs = [run(name, right(), observer=name) for name in ("a", "b")]
    text = Read(made(tmp_path, runs)).text
    assert "nothing to draw" in text


def test_a_setting_that_collapsed_is_listed_and_does_not_stretch_the_chart(tmp_path: Path) -> None:
    lost = right(*range(800))
    page = made(
        tmp_path, [*small(), run("broken", lost, 9.0, qconfig="per_channel", observer="entropy", calib__seed="0")]
    )
    text = Read(page).text
    assert "they lose more than half of the accuracy" in text
    assert "per_channel entropy in torchscript: -80.00" in text
    low = float(re.findall(r'"low": (-?[\d.]+)', page)[0])
    assert low > -30


def test_values_that_are_not_finite_break_nothing(tmp_path: Path) -> None:
    odd, top1 = small()[0]
    metrics = {
        name: float("nan") if "speedup" in name or "latency" in name else value for name, value in odd.metrics.items()
    }
    assert "Ship " in made(tmp_path, [(replace(odd, run_id="odd", metrics=metrics), top1), *small()[2:]])


@pytest.mark.parametrize("title", ["a/b", "..", "", "sweep 2026-11-30_17", "x" * 300, "Ünï cöde", "a=1,b=2 'c'"])
def test_a_title_makes_a_folder_of_one_level(title: str) -> None:
    name = files.folder_name(title)
    assert name
    assert len(name) <= 80
    assert Path(name).name == name
    assert not name.startswith(".")


def test_two_sweeps_of_a_name_have_a_folder_each() -> None:
    assert files.folder_name("ship", 32 * "a") != files.folder_name("ship", 32 * "b")


def test_the_note_has_the_recommendation_and_the_table_in_markdown(tmp_path: Path) -> None:
    runs = small()
    records = [record for record, _ in runs]
    found = [
        findings.of_study(one, QUESTION, findings.Files(None))
        for one in studies(records, {record.run_id: top1 for record, top1 in runs})
    ]
    note = files.note(found, records)
    assert note.startswith("Ship ")
    assert "\n\n| setting" in note


def test_the_override_that_finds_the_runs_again_is_their_sweep_or_their_study() -> None:
    one, other = (record for record, _ in small()[:2])
    parent = {files.PARENT_TAG: "p"}
    assert files.source_of([replace(one, tags=parent), replace(other, tags=parent)]) == "sweep=p"
    assert (
        files.source_of([replace(one, tags={**parent, "study": "s"}), replace(other, tags={"study": "s"})]) == "study=s"
    )
    assert files.source_of([one, other]) == ""


@pytest.mark.slow
def test_a_thousand_runs_take_seconds_and_a_page_that_opens(empty: Path, tmp_path: Path) -> None:
    shutil.copy(empty, tmp_path / "mlflow.db")
    store = tracking.connect(settings(), tmp_path)
    parent = write_sweep(store, *simulated_sweep(1000))
    started = time.process_time()  # not the clock's, since other tests run beside this one
    runs = tracking.find_runs(store, sweep=parent.run_id).records
    made = files.make(store, runs, QUESTION, tmp_path / "report", "a thousand")
    assert time.process_time() - started < 20
    assert (tmp_path / "report/report.html").stat().st_size < 5_000_000
    assert len((tmp_path / "report/runs.csv").read_text().splitlines()) == 1001
    assert "more candidates, in the report" in made.text
