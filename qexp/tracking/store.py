"""MLflow, and the only place that imports it: where runs are kept, how one is opened, filled, ended and read back.

Everything goes through `MlflowClient` with explicit run ids, never through MLflow's active run, so that many runs can
live in one process, nothing leaks from one to the next, and no exit hook of MLflow can call a broken run FINISHED.
"""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import posixpath
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

# Before mlflow is imported, since it reads them then. Its telemetry starts threads that call home, in a process
# that measures latency; it prints two lines for every run that ends on a server, and bars for files that it copies.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import numpy as np
import psutil
import requests
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from mlflow.store.db.utils import _all_tables_exist, _initialize_tables, create_sqlalchemy_engine
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.types.schema import Schema, TensorSpec
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from qexp.config import schema
from qexp.errors import InputError, QexpError, RunError
from qexp.records import Row
from qexp.system import credentials, machine
from qexp.system.credentials import masked

logger = logging.getLogger(__name__)
T = TypeVar("T")

PARAM_LENGTH = 6000  # MLflow cuts longer values without a word
LONG_PARAMS = "long_params.json"
TAG_LENGTH = 5000  # what servers of all versions take
NAME_LENGTH = 250
PAGE = 500
BESIDE_TAG = "qexp.artifacts_beside_database"
SWEEP_TAG = "qexp.sweep"  # of a sweep's own run, which others are children of
PARENT_TAG = "mlflow.parentRunId"
DATABASES = ("postgresql", "mysql", "mssql")  # what MLflow takes beside SQLite, as the scheme of an address
SQLITE_SECONDS = 20.0  # how long a database that another process writes to is waited for
LOCK_SECONDS = 120.0  # creating the tables takes 3 s, and several times that on a busy machine
# How one process at a time is let in, and lets go, in SQL: the first gives 1 or true where it is.
DATABASE_LOCKS = {
    "postgresql": ("SELECT pg_try_advisory_lock(7239471)", "SELECT pg_advisory_unlock(7239471)"),
    "mysql": ("SELECT GET_LOCK('qexp', 0)", "SELECT RELEASE_LOCK('qexp')"),
}
INPUT_ATTEMPTS = 10  # how often runs that record the same data sets for the first time may come in between
SERVED = Path(__file__).with_name("served_model.py")
# What MLflow imports only when it writes to an artifact store: by scheme, modules and the packages that have them.
ARTIFACT_CLIENTS = {
    **{scheme: {"boto3": "boto3"} for scheme in ("s3", "r2", "b2")},
    "gs": {"google.cloud.storage": "google-cloud-storage"},
    "wasbs": {"azure.storage.blob": "azure-storage-blob"},
    "abfss": {"azure.storage.filedatalake": "azure-storage-file-datalake"},
    **{scheme: {"pyarrow": "pyarrow"} for scheme in ("hdfs", "viewfs")},
    "sftp": {"paramiko": "paramiko", "pysftp": "pysftp"},
}
END_SECONDS = 15.0  # how long an ending run waits for its server


@dataclass(frozen=True)
class Store:
    """Where runs are kept.

    uri: the tracking URI. artifacts: URI of the folder that new experiments keep their artifacts in, None where a
    server decides; beside: whether that is the database's own neighbour, and so moves with it. experiment: the name
    asked for by a setting or by the environment, None for the default.
    """

    uri: str
    artifacts: str | None
    beside: bool
    experiment: str | None
    client: MlflowClient = field(repr=False, compare=False)

    def experiment_name(self, dataset: str) -> str:
        """Name of the experiment for runs on this data set: `qexp/<dataset>` unless another was asked for."""
        return self.experiment or f"qexp/{dataset}"


@dataclass(frozen=True)
class DatasetUse:
    """Images that a run used. source: folder, URL or import path; context: what for (`calibration`, `evaluation`)."""

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ui:
    """How to look at runs: `command` starts the UI (None where a server has one already), `url` opens it on them."""

    command: str | None
    url: str


# ---------------------------------------------------------------------------------------------------- where runs go


def connect(tracking: schema.Tracking, outputs: Path, folder: Path | None = None) -> Store:
    """The store that the settings, or else MLflow's own environment variables, name; by default one in `outputs`.

    outputs: folder for everything that is written, made if missing. folder: what a relative SQLite path is relative
    to (the current folder by default). Raises InputError where the store can't be used: nothing has been run then.
    """
    outputs = _make_folder(outputs)
    # An empty variable is one that somebody meant to unset.
    uri = given = (tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "").strip()
    setting = "tracking.uri" if tracking.uri else "MLFLOW_TRACKING_URI"
    credentials.learn(uri)
    if credentials.MASK in uri:
        raise InputError(f"{setting}={uri}: {credentials.MASK} stands for a credential; give it in full.")
    scheme = urllib.parse.urlsplit(uri).scheme
    artifacts: str | None = (outputs / "artifacts").as_uri()
    if not uri:
        uri = _open_sqlite(outputs / "mlflow.db", outputs / "artifacts", f"outputs={outputs}")
    elif scheme == "sqlite":
        uri = _open_sqlite(_sqlite_path(uri, folder or Path.cwd(), setting), outputs / "artifacts", f"{setting}={uri}")
    elif scheme in ("http", "https"):
        _probe(uri, setting, tracking.timeout)
        artifacts = None
    elif scheme in ("", "file") or len(scheme) == 1:  # one letter is a Windows drive
        raise InputError(
            f"{setting}={uri} is a folder, and MLflow keeps no runs in plain folders any more; leave it unset for "
            f"a database in {outputs}, or give sqlite:///path/to/mlflow.db or the http:// address of a server."
        )
    elif scheme.startswith("databricks"):
        artifacts = None
    elif scheme.partition("+")[0] in DATABASES:
        _open_database(uri, setting, tracking.timeout)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise _unusable(error, f"{setting}={masked(uri)}" if given else f"outputs={outputs}") from error
    named = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip()
    experiment = tracking.experiment or named or _experiment_by_id(client)
    beside = uri == f"sqlite:///{outputs / 'mlflow.db'}"
    return Store(uri, artifacts, beside, experiment, client)


def _make_folder(folder: Path) -> Path:
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"outputs={folder} can't be written to ({error.strerror}); give a folder that can, outputs=path."
        ) from error
    return folder.resolve()


def _sqlite_path(uri: str, folder: Path, setting: str) -> Path:
    path = urllib.parse.unquote(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path in ("", ":memory:") or path.startswith("file:"):
        raise InputError(
            f"{setting}={uri} keeps nothing that could be looked at later; give a file: sqlite:///path/mlflow.db."
        )
    return folder / path


def _open_sqlite(path: Path, artifacts: Path, setting: str) -> str:
    """URI of the SQLite store at `path`, made if missing. Raises InputError where it isn't a usable one."""
    if set("%?") & set(str(path)):
        raise InputError(f"{setting} has a % or ? in its path, which SQLite's addresses can't hold; choose another.")
    uri = f"sqlite:///{path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # MLflow's own first migration is not safe against a second process, whatever it tries.
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            if not path.exists() or path.stat().st_size == 0:
                _create_sqlite(path, artifacts)
            _check_sqlite(path, setting)
            if path == artifacts.with_name("mlflow.db"):
                _follow_moved_artifacts(path, artifacts.as_uri())
    except Timeout as error:
        raise InputError(
            f"{setting}: another process has held {error.lock_file} for {LOCK_SECONDS:.0f} s; end it, or choose "
            f"another folder."
        ) from error
    except OSError as error:
        raise InputError(f"{setting} can't be written to ({error.strerror}); choose another folder.") from error
    except ValueError as error:
        raise _unusable(error, setting) from error
    return uri


def _create_sqlite(path: Path, artifacts: Path) -> None:
    # Built beside it and moved into place when whole: a process killed half-way through MLflow's migration would
    # leave a file that no later one can use.
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder, _quiet_migration():
        new = Path(folder) / path.name
        new.touch()  # SQLite itself would keep it from the user's group, whatever the umask allows
        SqlAlchemyStore(f"sqlite:///{new}", artifacts.as_uri()).engine.dispose()
        new.replace(path)


@contextmanager
def _quiet_migration() -> Iterator[None]:
    """Without the two lines that say that the tables are being made."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.msg not in ("Creating initial MLflow database tables...", "Updating database tables")

    source = logging.getLogger("mlflow.store.db.utils")
    source.addFilter(wanted)
    try:
        yield
    finally:
        source.removeFilter(wanted)


def _check_sqlite(path: Path, setting: str) -> None:
    """Whether it is a database that can be written to; MLflow itself would retry for 100 s and then raise a page."""
    try:
        connection = sqlite3.connect(path, timeout=SQLITE_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE")
            # A transaction may begin where nothing can be written, to the file or beside it.
            connection.execute("CREATE TABLE qexp_can_write (value)")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        kind = error.sqlite_errorname
        if kind.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            reason = f"can't be written to by {_user()} ({error}); let its owner allow it, as with chmod g+w, or set"
            raise InputError(f"{setting}: MLflow's database {path} {reason} another folder, outputs=path.") from error
        if kind.startswith("SQLITE_BUSY"):
            reason = f"has been locked by another process for {SQLITE_SECONDS:.0f} s; end that one"
            raise InputError(f"{setting}: MLflow's database {path} {reason}.") from error
        raise InputError(f"{setting}: {path} can't be used as MLflow's database ({error}); move it away.") from error


def _open_database(uri: str, setting: str, timeout: float) -> None:
    """Whether a database server can be reached; and MLflow's tables in it, made if missing.

    As `_probe`, in a thread of its own. MLflow would try for 100 s, and its first migration fails where another process
    begins it at the same moment, on whatever machine: hence a lock of the database's own.
    """
    shown = masked(uri)
    waiting = threading.Event()

    def make_tables() -> None:
        engine = create_sqlalchemy_engine(uri)
        try:
            with engine.connect() as connection:
                waiting.set()
                with _database_lock(connection, setting, shown), _quiet_migration():
                    if not _all_tables_exist(engine):
                        _initialize_tables(engine)
        finally:
            engine.dispose()

    made = _in_thread(make_tables)
    try:
        try:
            made.result(timeout=2 * timeout + 1)
        except TimeoutError:
            if not waiting.is_set():
                advice = "start it, mend the address, or leave it unset for a local store"
                raise InputError(f"{setting}={shown} did not answer within {2 * timeout + 1:g} s; {advice}.") from None
            made.result(timeout=2 * LOCK_SECONDS)
    except (SQLAlchemyError, MlflowException, ImportError, ValueError, OSError) as error:
        reason = _first_line(getattr(error, "orig", None) or error)
        advice = ", the driver; install it, or name another in the scheme" if isinstance(error, ImportError) else ""
        raise InputError(f"{setting}={shown} can't be used: {reason}{advice}.") from error


@contextmanager
def _database_lock(connection: Connection, setting: str, shown: str) -> Iterator[None]:
    """Held by one process of all that use a database server, where it has such locks; a lost connection ends it."""
    take, release = DATABASE_LOCKS.get(connection.dialect.name, ("SELECT 1", "SELECT 1"))
    deadline = time.monotonic() + LOCK_SECONDS
    while not connection.execute(text(take)).scalar():
        if time.monotonic() > deadline:
            raise InputError(f"{setting}={shown}: another process has been making its tables for {LOCK_SECONDS:.0f} s.")
        time.sleep(0.1)
    try:
        yield
    finally:
        connection.execute(text(release))


def _follow_moved_artifacts(path: Path, artifacts: str) -> None:
    """Point the runs of a moved (or copied) outputs folder to the artifacts that lie beside their database.

    MLflow stores artifact locations as absolute paths. Without this, old artifacts would be missing in the UI, and
    new ones would be written into the old folder, made again for it.
    """
    connection = sqlite3.connect(path, timeout=SQLITE_SECONDS)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "logged_models" not in tables:  # of an older MLflow, which its own check refuses
            return
        rows = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id) "
            "WHERE key = ?",
            (BESIDE_TAG,),
        )
        for (old,) in rows.fetchall():
            if old != artifacts:
                logger.info("outputs has moved: artifacts recorded in %s are looked for in %s", old, artifacts)
                for table, column in (
                    ("experiments", "artifact_location"),
                    ("runs", "artifact_uri"),
                    ("logged_models", "artifact_location"),
                ):
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE substr({column} || '/', 1, ?) = ?",
                        (artifacts, len(old) + 1, len(old) + 1, old + "/"),
                    )
        connection.commit()
    finally:
        connection.close()


def _probe(uri: str, setting: str, timeout: float) -> None:
    """Ask the server one cheap question, once: MLflow's own client would try for minutes.

    In a thread of its own, since time-outs of requests bound neither the name's look-up nor a trickling answer.
    """
    shown = masked(uri)
    advice = "start it, mend the address, or leave it unset for a local store"
    if not urllib.parse.urlsplit(uri).hostname:
        raise InputError(f"{setting}={shown} is no address of a server; write it as http://host:port.")
    answer = _in_thread(
        lambda: http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            max_retries=0,
            timeout=timeout,
            raise_on_status=False,
        )
    )
    try:
        response = answer.result(timeout=2 * timeout + 1)
    except TimeoutError as error:
        raise InputError(f"{setting}={shown} did not answer within {2 * timeout + 1:g} s; {advice}.") from error
    except (MlflowException, requests.RequestException, OSError, ValueError) as error:
        cause = _root_cause(error)
        if _variables_in(cause):
            raise _unusable(error, f"{setting}={shown}") from error
        proxy = " through the proxy that HTTP_PROXY or HTTPS_PROXY names" if _of_proxy(error) else ""
        raise InputError(f"{setting}={shown} can't be reached{proxy} ({cause}); {advice}.") from error
    if response.status_code == 401 or (response.status_code == 403 and "Host" not in response.text[:200]):
        raise InputError(
            f"{setting}={shown} refuses the credentials ({response.status_code}); set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    try:
        known = response.status_code == 200 and isinstance(response.json(), dict)
    except ValueError:
        known = False
    if not known:
        said = " ".join(response.text.split())[:100]
        raise InputError(
            f"{setting}={shown} answers, but not as an MLflow server does ({response.status_code}: {said}); {advice}."
        )


def _experiment_by_id(client: MlflowClient) -> str | None:
    """Name of the experiment that MLFLOW_EXPERIMENT_ID (as `mlflow run` sets it) stands for."""
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not experiment_id:
        return None
    try:
        name: str = client.get_experiment(experiment_id).name
    except (MlflowException, requests.RequestException) as error:
        raise InputError(
            f"MLFLOW_EXPERIMENT_ID={experiment_id} can't be used ({_first_line(error)}); unset it, or name an "
            "experiment: tracking.experiment=NAME."
        ) from error
    return name


def check_experiment(store: Store, name: str) -> None:
    """Raise InputError if runs can't go to the experiment of this name; it need not exist yet, and isn't made."""
    with _refused(store, f"the experiment {name}"):
        experiment = store.client.get_experiment_by_name(name)
    if experiment is None:
        return
    if experiment.lifecycle_stage == "deleted":
        raise InputError(
            f"the MLflow experiment {name} was deleted; bring it back with `MLFLOW_TRACKING_URI="
            f"{masked(store.uri)} mlflow experiments restore --experiment-id {experiment.experiment_id}`, "
            f"or name another one: tracking.experiment=NAME."
        )
    location = urllib.parse.urlsplit(experiment.artifact_location or "")
    another = ", or name another experiment: tracking.experiment=NAME"
    _check_client(f"the MLflow experiment {name}", experiment.artifact_location, another)
    host = urllib.parse.urlsplit(store.uri).hostname
    # Such a server has clients write to a path of their own machine, where nobody finds the files again.
    if store.artifacts is None and host and not _is_this_machine(host) and location.scheme in ("", "file"):
        raise InputError(
            f"the MLflow experiment {name} keeps its artifacts in {experiment.artifact_location}, a folder of "
            f"the server {host} that can't be written to from here; start that server with --artifacts-destination "
            f"and name a new experiment: tracking.experiment=NAME."
        )


def _check_client(whose: str, location: str | None, otherwise: str = "") -> None:
    """Raise InputError where what MLflow needs to reach these artifacts isn't installed."""
    scheme = urllib.parse.urlsplit(location or "").scheme
    where = f"{whose} keeps its artifacts in {scheme}://"
    if scheme not in get_registered_artifact_repositories():
        raise InputError(f"{where}, which MLflow can't reach; install a plugin of MLflow's that does{otherwise}.")
    missing = [package for module, package in ARTIFACT_CLIENTS.get(scheme, {}).items() if not _is_installed(module)]
    if missing:
        raise InputError(f"{where}, for which MLflow needs {' and '.join(missing)}; pip install it{otherwise}.")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # a package that it is in isn't
        return False


def _is_this_machine(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())


def _experiment_id(store: Store, name: str) -> str:
    """Id of the experiment of this name, which is made if missing (perhaps by another process at this moment)."""
    check_experiment(store, name)
    for attempt in (1, 2):
        experiment = store.client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        try:
            # The kind makes the UI open on training runs rather than on traces of language models.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            if store.beside:
                tags[BESIDE_TAG] = "true"
            return str(store.client.create_experiment(name, artifact_location=store.artifacts, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or attempt == 2:
                raise
    raise AssertionError("unreachable")


# ------------------------------------------------------------------------------------------------------ one run


class Run:
    """One open run. As a context manager it ends itself: FINISHED, FAILED with what was raised, or KILLED."""

    def __init__(self, store: Store, run: MlflowRun) -> None:
        self.store = store
        self.id: str = run.info.run_id
        self.name: str = run.info.run_name
        self.experiment_id: str = run.info.experiment_id
        self.status = "RUNNING"
        self.is_sweep = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.status != "RUNNING":
            return
        if error is None:
            self.finish()
        elif isinstance(error, Exception):
            self.fail(sentence(error), "".join(traceback.format_exception(error)))
        else:
            self.kill()

    def log_result(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str] | None = None,
        artifacts: Mapping[str, Path | str | Mapping[str, Any] | Sequence[Any]] | None = None,
        datasets: Sequence[DatasetUse] = (),
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Log what came out, in few requests.

        metrics: those that are not finite are left out, and named in the tag `not_finite`.
        artifacts: by path in the run: a file or folder, or a text, or something to write as JSON.
        Raises RunError if the store does not take it.
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        left_out = {name: value for name, value in metrics.items() if name not in finite}
        all_tags = dict(tags or {})
        if left_out:
            all_tags["not_finite"] = ", ".join(f"{name}={value}" for name, value in left_out.items())
        with self._taking("the results"):
            self._log_batch(finite, params, all_tags)
            if datasets:
                self._log_inputs([_dataset_input(use) for use in datasets])
        self.log_artifacts({**_long(params or {}), **(artifacts or {})})

    def log_params(self, params: Mapping[str, str], tags: Mapping[str, str] | None = None) -> None:
        """Log params and tags.

        A param too long for MLflow is cut where it says so, and stands whole in `long_params.json`.
        """
        with self._taking("the params"):
            self._log_batch(params=params, tags=tags)
        self.log_artifacts(_long(params))

    def log_artifacts(self, artifacts: Mapping[str, Path | str | Mapping[str, Any] | Sequence[Any]]) -> None:
        """Log files, folders, texts and JSON by their path in the run, as one upload."""
        if not artifacts:
            return
        with tempfile.TemporaryDirectory(prefix="qexp-") as folder, self._taking("the artifacts"):
            for path, content in artifacts.items():
                _stage(Path(folder) / path, content)
            self.store.client.log_artifacts(self.id, folder)

    def log_model(
        self,
        torchscript: Path,
        engine: str,
        *,
        name: str,
        image: Sequence[int],
        classes: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Log a TorchScript INT8 model as an MLflow model, for `mlflow models serve` and the registry.

        image: (channels, height, width) of its float32 input [N, ...]; the output is float32 logits [N, classes].
        metadata: what a user of the model must know, as mean, std and class names. Returns its URI, `models:/...`.
        Raises RunError if it can't be logged.
        """
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.float32), (-1, *image))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, classes))]),
        )
        client = self.store.client
        with tempfile.TemporaryDirectory(prefix="qexp-") as folder, self._taking("the model"):
            model = client.create_logged_model(
                self.experiment_id, name=name, source_run_id=self.id, params={"engine": engine}
            )
            card = Model(artifact_path=model.artifact_location, run_id=self.id, model_id=model.model_id)
            try:
                with warnings.catch_warnings():
                    # The signature is exact; an example would only be run to infer one.
                    warnings.filterwarnings("ignore", ".*An input example was not provided")
                    save_model(
                        Path(folder) / "model",
                        python_model=str(SERVED),
                        artifacts={"model": str(torchscript)},
                        model_config={"engine": engine},
                        signature=signature,
                        # Given, since MLflow would find them out by running the model for 5 s in another process.
                        pip_requirements=[_requirement(package) for package in ("mlflow", "torch", "numpy")],
                        metadata=_plain(metadata or {}),
                        mlflow_model=card,
                    )
                _renewed(Path(folder) / "model" / SERVED.name)
                client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
                client.finalize_logged_model(model.model_id, "READY")
            except BaseException:
                client.finalize_logged_model(model.model_id, "FAILED")
                raise
            client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        return f"models:/{model.model_id}"

    def row(self) -> Row:
        """The run as the store has it now."""
        return _row(self.store.client.get_run(self.id))

    def finish(self) -> None:
        """End as FINISHED. Raises RunError if the store does not take it."""
        with self._taking("the end of the run"):
            self._end("FINISHED")

    def fail(self, error: str, trace: str) -> None:
        """End as FAILED, with the sentence as tag `error` and the traceback as an artifact. Never raises."""
        self._end_anyhow("FAILED", lambda: self._log_failure(error, trace))

    def kill(self) -> None:
        """End as KILLED. Raises nothing of its own, and an interrupt while it works doesn't stop it."""
        self._end_anyhow("KILLED")

    def _log_failure(self, error: str, trace: str) -> None:
        self._log_tags({"error": error})
        self.log_artifacts({"traceback.txt": trace})

    def _log_tags(self, tags: Mapping[str, str]) -> None:
        self._log_batch(tags=tags)

    def _log_batch(
        self,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """All in one request, where MLflow takes as many in one."""
        now = int(time.time() * 1000)
        self.store.client.log_batch(
            self.id,
            [Metric(name, value, now, 0) for name, value in _named(metrics or {}).items()],
            [Param(name, value) for name, value in _held(params or {}).items()],
            [RunTag(name, value) for name, value in _cut_tags(tags or {}).items()],
        )

    def _log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        """MLflow looks whether it has a data set, and if not inserts it; when another run does so in between, the whole
        request fails, and is made again."""
        for attempt in range(INPUT_ATTEMPTS):
            try:
                self.store.client.log_inputs(self.id, inputs)
                return
            except MlflowException as error:
                taken = any(word in str(error).lower() for word in ("unique", "duplicate"))
                if not taken or attempt == INPUT_ATTEMPTS - 1:
                    raise

    def _end(self, status: str) -> None:
        if self.status == "RUNNING":
            self.store.client.set_terminated(self.id, status)
            self.status = status

    def _end_anyhow(self, status: str, first: Callable[[], None] | None = None) -> None:
        # The status goes first: it matters most, and what follows may fail for the reason that the run did.
        # In a thread of its own, since signals interrupt the main thread only.
        def work() -> None:
            self._end(status)
            if first is not None:
                first()

        try:
            _in_thread(work).result(timeout=END_SECONDS)
        except Exception as problem:
            logger.warning(
                "MLflow at %s did not take that run %s ended as %s: %s",
                masked(self.store.uri),
                self.name,
                status,
                _root_cause(problem) or "no answer",
            )

    @contextmanager
    def _taking(self, what: str) -> Iterator[None]:
        try:
            yield
        except (MlflowException, requests.RequestException, OSError) as error:
            raise RunError(
                f"MLflow at {masked(self.store.uri)} did not take {what} of run {self.name}: {_first_line(error)}."
            ) from error


def start_run(
    store: Store,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    parent: str | None = None,
    description: str | None = None,
    resume: bool = False,
) -> Run:
    """Open a run. parent: id of the sweep's run, if it has one.

    resume: whether to go on with the run that MLFLOW_RUN_ID names (see `check_resumed`), as MLflow's own `start_run`
    does. That is for single runs only: all jobs of a sweep would end up in one.
    Raises InputError if the store refuses; no run is left open then, nor after an interrupt.
    """
    system = _system_tags(tags, description)
    if parent:
        system[PARENT_TAG] = parent
    resumed = os.environ.get("MLFLOW_RUN_ID") if resume else None
    if resumed:
        check_resumed(store, params, resumed)
    with _refused(store, f"the run {name}"):
        if resumed:
            run = _opened(store, lambda: _resume(store, resumed, system))
        else:
            experiment_id = _experiment_id(store, experiment)
            # Complete at once: a resumed sweep knows by its tags which job it was, were it killed the next moment.
            known = {**system, **_cut_tags(tags)}
            run = _opened(store, lambda: store.client.create_run(experiment_id, tags=known, run_name=masked(name)))
    try:
        run.log_params(params, tags if resumed else None)
    except RunError as error:
        run.fail(str(error), traceback.format_exc())
        raise
    except BaseException:
        run.kill()
        raise
    return run


def ignored(sweep: bool) -> list[str]:
    """A sentence for each of MLflow's environment variables that are set and not followed."""
    said = []
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in ("true", "1"):
        reason = "its samples would be taken while models are timed"
        said.append(f"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is set and not followed: {reason}.")
    if sweep and os.environ.get("MLFLOW_RUN_ID"):
        said.append("MLFLOW_RUN_ID is set and not followed: a sweep has a run for each of its jobs.")
    return said


def check_run(store: Store, *, experiment: str, params: Mapping[str, str], resume: bool) -> None:
    """Raise InputError where `start_run` would, before anything is computed; nothing is changed."""
    resumed = os.environ.get("MLFLOW_RUN_ID") if resume else None
    if resumed:
        check_resumed(store, params, resumed)
    else:
        check_experiment(store, experiment)


def check_resumed(store: Store, params: Mapping[str, str], run_id: str) -> None:
    """Raise InputError where this run, which MLFLOW_RUN_ID names, is none to go on with; it isn't changed.

    It may be one that `mlflow run` has opened, or one that has failed or was killed, with these params as far as it has
    any: a result is never written over.
    """
    try:
        run = store.client.get_run(run_id)
        experiment = store.client.get_experiment(run.info.experiment_id).name
    except (MlflowException, requests.RequestException) as error:
        shown = masked(store.uri)
        raise InputError(
            f"MLFLOW_RUN_ID={run_id}: MLflow at {shown} has no such run ({_first_line(error)})."
        ) from error
    row = _row(run)
    there = {name: value for name, value in _held(params).items() if row.params.get(name, value) != value}
    reason = ""
    if run.info.lifecycle_stage == "deleted":
        reason = "was deleted"
    elif SWEEP_TAG in row.tags:
        reason = "is a whole sweep's"
    elif row.status == "FINISHED":
        reason = "is FINISHED, and its result would be written over"
    elif row.status == "RUNNING" and _is_anothers(row):
        reason = f"is still being run, by process {row.tags['pid']} on {row.tags['host']}"
    elif store.experiment not in (None, experiment):
        reason = f"is of the experiment {experiment}, and {store.experiment} is asked for"
    elif there:
        name, value = next(iter(there.items()))
        others = f" and {len(there) - 1} more settings" if len(there) > 1 else ""
        reason = f"has other settings: {name}={row.params[name]}, not {value}{others}"
    if reason:
        advice = "unset it for a run of its own, or give the id of one that has not ended well"
        raise InputError(f"MLFLOW_RUN_ID={run_id}: the run {row.name!r} {reason}; {advice}.")
    _check_client(f"MLFLOW_RUN_ID={run_id}: the run", run.info.artifact_uri, ", or unset it")


def _is_anothers(row: Row) -> bool:
    """Whether a process that is not this one says that it has the run, and is not known to have ended."""
    if "pid" not in row.tags or "host" not in row.tags:  # `mlflow run` opens it for whom it starts
        return False
    here = row.tags["host"] == machine.host()
    return not here or (row.tags["pid"] != str(os.getpid()) and _has_process(row))


def _opened(store: Store, call: Callable[[], MlflowRun]) -> Run:
    """The run that `call` opens; none is left open after an interrupt."""
    opened = _in_thread(call)
    try:
        return Run(store, opened.result())
    except BaseException:
        # An interrupt while the store was opening the run, whose id only the thread may know.
        if not opened.done() or opened.exception() is None:
            Run(store, opened.result(timeout=END_SECONDS)).kill()
        raise


def _resume(store: Store, run_id: str, system: Mapping[str, str]) -> MlflowRun:
    run = store.client.get_run(run_id)
    # Whose it is first: a run that is open and of a process that is gone would be closed.
    Run(store, run)._log_tags(system)
    if "error" in run.data.tags:
        store.client.delete_tag(run_id, "error")
    store.client.update_run(run_id, status="RUNNING")
    return run


def open_parent(
    store: Store,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    description: str | None = None,
    again: str | None = None,
) -> Run:
    """Open the run of a whole sweep, whose id the children are given.

    again: id of a sweep's run that has ended, which is opened again instead of another one.
    """
    tags = {**tags, SWEEP_TAG: "true"}
    if again is None:
        parent = start_run(store, experiment=experiment, name=name, params={}, tags=tags, description=description)
    else:
        with _refused(store, f"the run {again}"):
            parent = _opened(store, lambda: _resume(store, again, {**_system_tags(tags, description), **tags}))
    parent.is_sweep = True
    return parent


def close_parent(
    parent: Run,
    status: str,
    table: str,
    counts: Mapping[str, int],
    artifacts: Mapping[str, Path | str | Mapping[str, Any] | Sequence[Any]] | None = None,
) -> None:
    """End a sweep's run. status: FINISHED, FAILED or KILLED; counts: `finished`, `failed`, ..., logged as `jobs/...`.

    Never raises: a sweep whose store has gone still has its table to print.
    """

    def contents() -> None:
        parent.log_result(
            {f"jobs/{name}": float(count) for name, count in counts.items()},
            artifacts={"table.txt": table, **(artifacts or {})},
        )

    parent._end_anyhow(status, contents)


def children(store: Store, parent: str, experiments: Sequence[str] = ()) -> list[Row]:
    """The runs of a sweep in the order they started, all pages of them.

    experiments: names of the experiments that they are in; by default, the parent's own.
    """
    with _refused(store, "a search"):
        ids = _ids(store, experiments) if experiments else [store.client.get_run(parent).info.experiment_id]
        return _search(store, ids, f"tags.`{PARENT_TAG}` = '{parent}'")


def of_study(store: Store, study: str, experiments: Sequence[str]) -> list[Row]:
    """The runs with this tag `study`, the sweeps' own among them, in the order they started; none that was deleted."""
    with _refused(store, "a search"):
        return _search(store, _ids(store, experiments), f"tags.study = {_literal(study)}")


def _ids(store: Store, experiments: Sequence[str]) -> list[str]:
    found = [store.client.get_experiment_by_name(name) for name in experiments]
    return [experiment.experiment_id for experiment in found if experiment is not None]


def _search(store: Store, experiment_ids: Sequence[str], condition: str) -> list[Row]:
    """All pages of it, in the order in which the runs started."""
    rows: list[Row] = []
    token: str | None = None
    while experiment_ids:
        page = store.client.search_runs(
            list(experiment_ids), condition, max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        rows.extend(_row(run) for run in page)
        token = page.token
        if not token:
            break
    return rows


def _literal(text: str) -> str:
    """A string in a condition of MLflow's, which knows no escapes."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def adopt(store: Store, parent: str, rows: Sequence[Row]) -> None:
    """Make those of the runs children of `parent` that have none, or one that was deleted."""
    by_parent: dict[str, list[Row]] = {}
    for row in rows:
        by_parent.setdefault(row.tags.get(PARENT_TAG, ""), []).append(row)
    with _refused(store, "a parent of runs"):
        for former, its in by_parent.items():
            if former != parent and not (former and _exists(store, former)):
                for row in its:
                    store.client.set_tag(row.run_id, PARENT_TAG, parent)


def _exists(store: Store, run_id: str) -> bool:
    try:
        return bool(store.client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def close_orphans(store: Store) -> list[Row]:
    """Close as KILLED what processes of this machine left open that are gone; what was closed.

    Runs of other machines, and those whose process runs or may do so, are left alone.
    """
    with _refused(store, "a search"):
        experiments = _experiments(store)
        mine = _search(store, experiments, f"attributes.status = 'RUNNING' and tags.host = {_literal(machine.host())}")
        gone = [row for row in mine if not _has_process(row)]
        # One may have ended by itself since the search; now that its process is gone, nobody else ends it.
        left = [row for row in gone if store.client.get_run(row.run_id).info.status == "RUNNING"]
        for row in left:
            store.client.set_tag(row.run_id, "error", f"process {row.tags['pid']} ended without closing the run.")
            store.client.set_terminated(row.run_id, "KILLED")
    return left


def _experiments(store: Store) -> list[str]:
    """Ids of all experiments."""
    ids: list[str] = []
    token: str | None = None
    while True:
        page = store.client.search_experiments(max_results=PAGE, page_token=token)
        ids.extend(experiment.experiment_id for experiment in page)
        token = page.token
        if not token:
            return ids


def _has_process(row: Row) -> bool:
    try:
        return machine.is_running(int(row.tags["pid"]), float(row.tags["pid_started"]))
    except (KeyError, ValueError):  # not as this module writes them
        return True


def find(store: Store, run_id: str) -> tuple[Row, str]:
    """The run of this id, and the name of its experiment. Raises InputError where there is none."""
    try:
        run = store.client.get_run(run_id)
        return _row(run), store.client.get_experiment(run.info.experiment_id).name
    except (MlflowException, requests.RequestException) as error:
        raise InputError(f"there is no run {run_id} in MLflow at {masked(store.uri)}: {_first_line(error)}.") from error


def fetch(store: Store, run_id: str, name: str, folder: Path) -> Path | None:
    """A copy, in `folder`, of the artifact of this name at the top of a run; None where the run has none."""
    with _refused(store, f"the artifacts of run {run_id}"):
        _check_client(f"the run {run_id}", store.client.get_run(run_id).info.artifact_uri)
        if name not in {file.path for file in store.client.list_artifacts(run_id)}:
            return None
        return Path(store.client.download_artifacts(run_id, name, str(folder)))


def _row(run: MlflowRun) -> Row:
    info, data = run.info, run.data
    end = info.end_time / 1000 if info.end_time else None
    start = info.start_time / 1000
    return Row(info.run_id, info.run_name, info.status, start, end, data.params, data.metrics, data.tags)


def ui(store: Store, run: Run, sort_by: str = "accuracy/int8") -> Ui:
    """How to open MLflow's UI on exactly a sweep's runs, given its parent, or on the page of a single run.

    sort_by: the metric that a sweep's runs are listed by.
    """
    local = store.artifacts is not None
    base = "http://127.0.0.1:5000" if local else re.sub(r"//[^/@]*@", "//", store.uri).rstrip("/")
    where = f"{base}/#/experiments/{run.experiment_id}/runs"
    query = {"workflowType": "machine_learning"}
    if not run.is_sweep:
        where += f"/{run.id}"
    else:
        # Sorted by time, as it is by default, the UI folds all children away under their parent.
        query["searchFilter"] = f"tags.`{PARENT_TAG}` = '{run.id}'"
        query["orderByKey"], query["orderByAsc"] = f"metrics.`{sort_by}`", "false"
    url = f"{where}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"
    if not local:
        return Ui(None, url)
    beside = Path(sys.executable).with_name("mlflow")
    program = str(beside) if beside.exists() else "mlflow"
    options = ["--backend-store-uri", masked(store.uri), "--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
    return Ui(shlex.join([program, "ui", *options]), url)


# ---------------------------------------------------------------------------------------------- what MLflow takes


def _named(values: Mapping[str, T]) -> dict[str, T]:
    """The same values under names that MLflow takes: one bad character would fail the whole batch."""
    named: dict[str, T] = {}
    for name, value in values.items():
        legal = re.sub(r"[^\w./\- :]", "_", name)
        legal = posixpath.normpath(legal).strip("/")[:NAME_LENGTH] or "_"
        legal = re.sub(r"^\.+", "_", legal)
        unique, number = legal, 2
        while unique in named:
            unique, number = f"{legal[: NAME_LENGTH - 5]}_{number}", number + 1
        named[unique] = value
    return named


def _held(params: Mapping[str, str]) -> dict[str, str]:
    """Params as MLflow holds them."""
    return {name: _cut(masked(value), PARAM_LENGTH, LONG_PARAMS) for name, value in _named(params).items()}


def _long(params: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The params that MLflow can't hold, as an artifact."""
    long = {name: value for name, value in params.items() if len(value) > PARAM_LENGTH}
    return {LONG_PARAMS: long} if long else {}


def _cut(value: str, length: int, where: str = "") -> str:
    if len(value) <= length:
        return value
    note = f"... ({len(value)} characters{', all in ' + where if where else ''})"
    return value[: length - len(note)] + note


def _stage(path: Path, content: Path | str | Mapping[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        if content.is_dir():
            shutil.copytree(content, path)
            return
        try:
            os.link(content, path)  # large files need not be copied twice
        except OSError:
            shutil.copyfile(content, path)
    elif isinstance(content, str):
        path.write_text(masked(content), encoding="utf-8", errors="backslashreplace")
    else:
        # What is not finite becomes null: browsers refuse NaN in JSON.
        written = credentials.masked_tree(_plain(content))
        path.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _renewed(file: Path) -> None:
    """Give a file that was copied with its permissions those of a new one."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _dataset_input(use: DatasetUse) -> DatasetInput:
    scheme = urllib.parse.urlsplit(use.source).scheme
    where = masked(use.source)
    kind, source = ("http", {"url": where}) if scheme in ("http", "https") else ("local", {"uri": where})
    dataset = Dataset(
        name=use.name[:500],
        digest=use.digest[:36],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(_plain(use.profile)),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", use.context)])


def _system_tags(tags: Mapping[str, str], description: str | None) -> dict[str, str]:
    """What MLflow's own front end fills in, and its UI shows; and whose run it is, for `close_orphans`."""
    system = {"mlflow.user": _user(), "mlflow.source.name": "qexp", "mlflow.source.type": "LOCAL"}
    process = psutil.Process()
    system |= {"host": machine.host(), "pid": str(process.pid), "pid_started": f"{machine.since_boot(process):.2f}"}
    if tags.get("git_sha"):
        system["mlflow.source.git.commit"] = tags["git_sha"]
    if description:
        system["mlflow.note.content"] = description
    return system


def _cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(masked(value), TAG_LENGTH) for name, value in _named(tags).items()}


def _requirement(package: str) -> str:
    return f"{package}=={version(package).split('+')[0]}"  # 2.13.0+cpu is on no index


def _user() -> str:
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user id has no name
        return "unknown"


# -------------------------------------------------------------------------------------------------------- errors


def sentence(error: BaseException) -> str:
    """An error in one line, without credentials: ours as they are, others with their type before them."""
    text = masked(" ".join(str(error).split()))
    return text if isinstance(error, QexpError) else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def _refused(store: Store, what: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        raise InputError(f"MLflow at {masked(store.uri)} refuses {what}: {_first_line(error)}.") from error


def _unusable(error: BaseException, what: str) -> InputError:
    """Why a store can't be used: an environment variable of a library, where the error is about one, else `what`."""
    said = _first_line(error)
    variables = _variables_in(said)
    blamed = f"the environment variable {' or '.join(variables)}" if variables else what
    return InputError(f"{blamed} can't be used: {said}.")


def _variables_in(text: str) -> list[str]:
    """Which environment variables that MLflow or requests reads an error's text is about, by their names or values."""
    known = ("MLFLOW_", "REQUESTS_", "CURL_")
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(known)
        and name != "MLFLOW_TRACKING_URI"
        and (name in text or (len(value) > 2 and f" {value}" in f" {text}"))
    )


def _of_proxy(error: BaseException | None) -> bool:
    """Whether it is a proxy that can't be reached."""
    while error is not None:
        if isinstance(error, requests.exceptions.ProxyError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    """The first line that says something: SQLAlchemy may begin with how it came to write what then failed."""
    lines = str(error).strip().split("\n")
    told = [line for line in lines if not line.startswith("(raised as a result of Query-invoked autoflush")]
    return masked((told or lines)[0].rstrip("."))


def _root_cause(error: BaseException) -> str:
    """The last clause of requests' nested messages, as `Connection refused`."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(getattr(error, "strerror", None) or error)
    return text.strip().split("\n")[0].rstrip(".")


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """Start a call in a daemon thread, where no signal interrupts it and where waiting for it can have a limit."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="qexp-tracking", daemon=True).start()
    return future
