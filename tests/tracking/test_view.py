"""The view of a sweep's runs that MLflow's UI opens by a link."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import shutil
import urllib.parse
import zlib
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from qexp import tracking
from qexp.metrics import Metric, described
from qexp.tracking import view
from tests.helpers.stores import settings

# The keys of a view's state that were saved by hand in MLflow 3.17.
SAVED_BY_HAND = """
searchFilter orderByKey orderByAsc startTime lifecycleFilter datasetsFilter modelVersionFilter selectedColumns
columnOrder columnWidths runsHiddenMode compareRunCharts compareRunSections viewMaximized runListHidden
isAccordionReordered useGroupedValuesInCharts hideEmptyCharts groupBy groupsExpanded globalLineChartConfig
"""


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> tracking.Store:
    shutil.copy(empty, tmp_path)
    return tracking.connect(settings(), tmp_path)


@pytest.fixture
def parent(store: tracking.Store) -> tracking.Run:
    return tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={})


def saved(store: tracking.Store, parent: tracking.Run) -> dict[str, Any]:
    """The view, read from its tag as the UI does."""
    text = store.client.get_experiment(parent.experiment_id).tags[f"mlflow.sharedViewState.{parent.id}"]
    assert len(text) < 5000  # what MLflow takes
    header, _, content = text.partition(";")
    assert header == "deflate"
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(content)))
    return state


def test_a_view_shows_the_sweeps_runs_with_what_matters(store: tracking.Store, parent: tracking.Run) -> None:
    varied = ["qconfig", "calib.batches"]
    assert tracking.save_view(store, parent, varied) == parent.id
    state = saved(store, parent)
    assert set(state) <= set(SAVED_BY_HAND.split())
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{parent.id}'"
    assert state["selectedColumns"] == [
        "metrics.`accuracy/delta`", "metrics.`latency/int8_ms`", "metrics.`latency/speedup`", "tags.`verdict`",
        "params.`qconfig`", "params.`calib.batches`",
    ]  # fmt: skip
    assert state["columnOrder"][-6:] == state["selectedColumns"]
    assert state["runsHiddenMode"] == "SHOW_ALL"  # else charts have the first ten
    charts = {chart["uuid"]: chart for chart in state["compareRunCharts"]}
    assert [chart["type"] for chart in charts.values()] == ["SCATTER", "PARALLEL", "BAR", "BAR"]
    scatter = charts["qexp-scatter"]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("latency/int8_ms", "accuracy/delta")
    assert charts["qexp-parallel"]["selectedParams"] == varied
    assert charts["qexp-parallel"]["selectedMetrics"] == ["latency/int8_ms", "accuracy/delta"]
    [section] = state["compareRunSections"]
    assert {chart["metricSectionId"] for chart in charts.values()} == {section["uuid"]}
    assert all(described(metric) for metric in charts["qexp-parallel"]["selectedMetrics"])
    # A later sweep of the same study takes its place.
    tracking.save_view(store, parent, ["seed"])
    assert saved(store, parent)["selectedColumns"][-1] == "params.`seed`"


def test_a_view_of_very_many_settings_fits_into_a_tag(store: tracking.Store, parent: tracking.Run) -> None:
    assert tracking.save_view(store, parent, [f"some.setting.number.{n}" for n in range(100)]) == parent.id
    assert len(saved(store, parent)["compareRunCharts"]) == 4


def test_a_link_to_a_view_holds_nothing_that_the_view_does(store: tracking.Store, parent: tracking.Run) -> None:
    def query(**given: Any) -> dict[str, list[str]]:
        return urllib.parse.parse_qs(tracking.ui(store, parent, **given).url.partition("?")[2])

    assert query(view=parent.id) == {"workflowType": ["machine_learning"], "viewStateShareKey": [parent.id]}
    assert "viewStateShareKey" not in query()
    assert query()["orderByKey"] == [f"metrics.`{Metric.accuracy_int8}`"]


def test_a_server_has_a_view_from_mlflow_3_on(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tracking.connect(settings(server[0]), tmp_path)
    parent = tracking.open_parent(store, experiment="qexp/viewed", name="sweep", tags={})
    assert tracking.save_view(store, parent, []) == parent.id
    assert saved(store, parent)["orderByKey"] == "metrics.`accuracy/delta`"
    monkeypatch.setattr(view, "VERSION", 99)
    assert tracking.save_view(store, parent, []) is None
    assert tracking.save_view(dataclasses.replace(store, uri="databricks"), parent, []) is None
    nobody = dataclasses.replace(store, uri="http://127.0.0.1:9")
    assert tracking.save_view(nobody, parent, []) is None


def test_a_store_that_takes_no_view_is_a_sentence(
    store: tracking.Store, parent: tracking.Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(*given: Any) -> None:
        raise MlflowException("no more tags")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(store.client, "set_experiment_tag", refusing)
    assert tracking.save_view(store, parent, []) is None
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow did not take the view of the sweep's runs: no more tags."
    ]
