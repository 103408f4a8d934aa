"""MLflow: the store, a run, what is read back. No other package imports it."""

import os

# Before mlflow is imported, since it reads them then. Its telemetry starts threads that call home, in a process
# that measures latency; it prints two lines for every run that ends on a server, and bars for files that it copies.
# A request that a server has not answered is made again in `patience`, which knows what may be made twice.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

from qexp.records import PARENT_TAG
from qexp.tracking.artifacts import artifacts, top1
from qexp.tracking.errors import sentence
from qexp.tracking.links import ui
from qexp.tracking.query import Selection, adopt, children, close_lost, close_orphans, fetch, find, find_runs, of_study
from qexp.tracking.run import (
    DatasetUse,
    Run,
    check_run,
    close_parent,
    describe_parent,
    ignored,
    open_parent,
    start_run,
)
from qexp.tracking.store import Store, check_experiment, connect, connect_existing
from qexp.tracking.unsent import Outcome, deliver, send_unsent
from qexp.tracking.values import SWEEP_TAG
from qexp.tracking.view import save_view

__all__ = [
    "PARENT_TAG",
    "SWEEP_TAG",
    "DatasetUse",
    "Outcome",
    "Run",
    "Selection",
    "Store",
    "adopt",
    "artifacts",
    "check_experiment",
    "check_run",
    "children",
    "close_lost",
    "close_orphans",
    "close_parent",
    "connect",
    "connect_existing",
    "deliver",
    "describe_parent",
    "fetch",
    "find",
    "find_runs",
    "ignored",
    "of_study",
    "open_parent",
    "save_view",
    "send_unsent",
    "sentence",
    "start_run",
    "top1",
    "ui",
]
