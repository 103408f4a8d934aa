"""A sweep's view in MLflow's UI, as its own "Share" saves one: which columns and charts of the runs are shown."""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from qexp.metrics import Metric
from qexp.records import PARENT_TAG
from qexp.tracking.errors import first_line
from qexp.tracking.run import Run
from qexp.tracking.store import Store

log = logging.getLogger(__name__)

VIEW_TAG = "mlflow.sharedViewState."  # of an experiment, with the key that a link gives after it
VIEW_KEY = "viewStateShareKey"  # in a link
VERSION = 3  # of MLflow, whose UI this is written for
COLUMNS = (Metric.accuracy_delta, Metric.latency_int8, Metric.speedup)
VERDICT = "verdict"
ALWAYS_SHOWN = {"attributes.`Run Name`": 360, "runDateAndNestInfo": 130}  # columns with their widths in pixels
RUNS_IN_CHARTS = 100  # more make the browser slow
SECTION = "qexp-sweep"


def save_view(store: Store, parent: Run, varied: Sequence[str]) -> str | None:
    """Save a view of a sweep's runs, and return its key; None where the server's version doesn't know of views.

    varied: the params that the runs differ in. A sweep has one view: a later one takes the place of an earlier one.
    """
    try:
        if not _takes_views(store):
            return None
        store.client.set_experiment_tag(parent.experiment_id, VIEW_TAG + parent.id, encoded(view(parent.id, varied)))
    except (MlflowException, requests.RequestException, OSError) as error:
        log.warning("MLflow did not take the view of the sweep's runs: %s.", first_line(error))
        return None
    return parent.id


def _takes_views(store: Store) -> bool:
    if store.artifacts is not None:  # its UI is of the MLflow that is installed here
        return True
    if not store.uri.startswith("http"):
        return False
    answer = http_request(
        get_default_host_creds(store.uri), "/version", "GET", max_retries=0, timeout=5, raise_on_status=False
    )
    major, _, _ = answer.text.strip().partition(".")
    return answer.status_code == 200 and major.isdigit() and int(major) >= VERSION


def encoded(state: dict[str, Any]) -> str:
    """A view as the UI writes it into a tag."""
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()}"


def decoded(text: str) -> dict[str, Any]:
    """The view that `encoded` wrote."""
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))))
    return state


def view(parent: str, varied: Sequence[str]) -> dict[str, Any]:
    """The children of the run `parent`, the most accurate first, with the columns that matter, and charts of them."""
    columns = [column("metrics", metric) for metric in COLUMNS]
    columns += [column("tags", VERDICT), *(column("params", param) for param in varied)]
    return {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{parent}'",
        # Sorted by time, as it is by default, the UI folds all children away under their parent.
        "orderByKey": column("metrics", Metric.accuracy_delta),
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [*ALWAYS_SHOWN, *columns],
        "columnWidths": {**ALWAYS_SHOWN, **{name: _width(name) for name in columns}},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": list(_charts(varied)),
        "compareRunSections": [
            {
                "uuid": SECTION,
                "name": "Sweep",
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
                "columns": 2,
            }
        ],
        "isAccordionReordered": True,
        "viewMaximized": False,
        "runListHidden": False,
        "groupBy": None,
        "hideEmptyCharts": True,
    }


def column(kind: str, name: str) -> str:
    """The key of a column, or of an order, in the UI."""
    return f"{kind}.`{name}`"


def _width(key: str) -> int:
    """Pixels for a column: of a metric for its first digits, of others for the heading, within bounds."""
    kind, _, heading = key.strip("`").partition(".`")
    return 125 if kind == "metrics" else max(110, min(200, 50 + 7 * len(heading)))


def _charts(varied: Sequence[str]) -> Iterator[dict[str, Any]]:
    common = {"metricSectionId": SECTION, "deleted": False, "isGenerated": False}
    axis = {"type": "METRIC"}
    yield {
        **common,
        "uuid": "qexp-scatter",
        "type": "SCATTER",
        "xaxis": {**axis, "key": Metric.latency_int8},
        "yaxis": {**axis, "key": Metric.accuracy_delta},
        "runsCountToCompare": RUNS_IN_CHARTS,
        "displayName": "Accuracy lost against latency",
    }
    yield {
        **common,
        "uuid": "qexp-parallel",
        "type": "PARALLEL",
        "selectedParams": list(varied),
        "selectedMetrics": [Metric.latency_int8, Metric.accuracy_delta],
        "runsCountToCompare": RUNS_IN_CHARTS,
        "showAllRuns": True,
        "displayName": "Settings that varied",
    }
    for metric in (Metric.accuracy_delta, Metric.latency_int8):
        yield {
            **common,
            "uuid": f"qexp-bar-{metric.name}",
            "type": "BAR",
            "metricKey": metric,
            "runsCountToCompare": RUNS_IN_CHARTS,
            "displayName": metric,
        }
