"""Links to runs in MLflow's UI."""

from __future__ import annotations

import re
import shlex
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from qexp.metrics import Metric
from qexp.records import PARENT_TAG
from qexp.system.credentials import masked
from qexp.tracking.run import Run
from qexp.tracking.store import Store
from qexp.tracking.view import VIEW_KEY


@dataclass(frozen=True)
class Ui:
    """A link to runs: `command` starts the UI (None where a server has one already), `url` opens it on them."""

    command: str | None
    url: str


def ui(store: Store, run: Run, view: str | None = None, sort_by: Metric = Metric.accuracy_int8) -> Ui:
    """The link to exactly a sweep's runs, given its parent, or to the page of a single run.

    view: the key of a saved view of the sweep's runs (see `save_view`); where there is none, they are listed by the
    metric sort_by.
    """
    local = store.artifacts is not None
    base = "http://127.0.0.1:5000" if local else re.sub(r"//[^/@]*@", "//", store.uri).rstrip("/")
    where = f"{base}/#/experiments/{run.experiment_id}/runs"
    query = {"workflowType": "machine_learning"}
    if not run.is_sweep:
        where += f"/{run.id}"
    elif view:
        query[VIEW_KEY] = view  # nothing beside it that a view holds too, or the UI leaves the whole view out
    else:
        # Sorted by time, as it is by default, the UI folds all children away under their parent.
        query["searchFilter"] = f"tags.`{PARENT_TAG}` = '{run.id}'"
        query["orderByKey"] = f"metrics.`{sort_by}`"
        query["orderByAsc"] = str(sort_by.better == "lower").lower()
    url = f"{where}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"
    if not local:
        return Ui(None, url)
    beside = Path(sys.executable).with_name("mlflow")
    program = str(beside) if beside.exists() else "mlflow"
    options = ["--backend-store-uri", masked(store.uri), "--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
    return Ui(shlex.join([program, "ui", *options]), url)
