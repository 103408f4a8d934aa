"""The store in which MLflow keeps runs: found from the settings, and checked.

Everything goes through `MlflowClient` with explicit run ids, never through MLflow's active run, so that many runs can
live in one process, nothing leaks from one to the next, and no exit hook of MLflow can call a broken run FINISHED.
"""

from __future__ import annotations

import os
import socket
import tempfile
import urllib.parse
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar, cast

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from qexp.config import schema
from qexp.errors import InputError
from qexp.system import credentials
from qexp.system.credentials import masked
from qexp.tracking.databases import BESIDE_TAG, DATABASES, open_database, open_sqlite, sqlite_path
from qexp.tracking.errors import first_line, in_thread, of_proxy, refused, root_cause, unusable, variables_in
from qexp.tracking.patience import PatientClient

T = TypeVar("T")

# What MLflow imports only when it writes to an artifact store: by scheme, modules and the packages that have them.
ARTIFACT_CLIENTS = {
    **{scheme: {"boto3": "boto3"} for scheme in ("s3", "r2", "b2")},
    "gs": {"google.cloud.storage": "google-cloud-storage"},
    "wasbs": {"azure.storage.blob": "azure-storage-blob"},
    "abfss": {"azure.storage.filedatalake": "azure-storage-file-datalake"},
    **{scheme: {"pyarrow": "pyarrow"} for scheme in ("hdfs", "viewfs")},
    "sftp": {"paramiko": "paramiko", "pysftp": "pysftp"},
}


@dataclass(frozen=True)
class Store:
    """A place where MLflow keeps runs.

    uri: the tracking URI. artifacts: URI of the folder that new experiments keep their artifacts in, None where a
    server decides; beside: whether that is the database's own neighbour, and so moves with it. experiment: the name
    asked for by a setting or by the environment, None for the default.
    """

    uri: str
    artifacts: str | None
    beside: bool
    experiment: str | None
    client: MlflowClient = field(repr=False, compare=False)

    @property
    def is_server(self) -> bool:
        return self.uri.startswith("http")

    def experiment_name(self, dataset: str) -> str:
        """Name of the experiment for runs on this data set: `qexp/<dataset>` unless another was asked for."""
        return self.experiment or f"qexp/{dataset}"


def connect_existing(tracking: schema.Connection, outputs: Path, folder: Path | None = None) -> Store:
    """The same as `connect`, to read runs: raises InputError where the default store is meant and there is none yet,
    which `connect` would make."""
    elsewhere = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not elsewhere and not (outputs / "mlflow.db").is_file():
        raise InputError(
            f"outputs={outputs} has no runs (there is no mlflow.db in it); give the folder that has, or "
            "tracking.uri=ADDRESS."
        )
    return connect(tracking, outputs, folder)


def connect(tracking: schema.Connection, outputs: Path, folder: Path | None = None, *, known: bool = False) -> Store:
    """The store that the settings, or else MLflow's own environment variables, name; by default one in `outputs`.

    outputs: folder for everything that is written, made if missing. folder: what a relative SQLite path is relative
    to (the current folder by default). known: True where the server has answered this sweep or run before: it is waited
    for like any server in use (see `PatientClient`). Raises InputError where the store can't be used: nothing has been
    run then.
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
        uri = open_sqlite(outputs / "mlflow.db", outputs / "artifacts", f"outputs={outputs}")
    elif scheme == "sqlite":
        uri = open_sqlite(sqlite_path(uri, folder or Path.cwd(), setting), outputs / "artifacts", f"{setting}={uri}")
    elif scheme in ("http", "https"):
        if not known:
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
        open_database(uri, setting, tracking.timeout)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise unusable(error, f"{setting}={masked(uri)}" if given else f"outputs={outputs}") from error
    if scheme in ("http", "https"):
        client = cast(MlflowClient, PatientClient(client, uri, tracking.patience))
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


def _probe(uri: str, setting: str, timeout: float) -> None:
    """Ask the server one cheap question, once: MLflow's own client would try for minutes.

    In a thread of its own, since time-outs of requests bound neither the name's look-up nor a trickling answer.
    """
    shown = masked(uri)
    advice = "start it, mend the address, or leave it unset for a local store"
    if not urllib.parse.urlsplit(uri).hostname:
        raise InputError(f"{setting}={shown} is no address of a server; write it as http://host:port.")
    answer = in_thread(
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
        cause = root_cause(error)
        if variables_in(cause):
            raise unusable(error, f"{setting}={shown}") from error
        proxy = " through the proxy that HTTP_PROXY or HTTPS_PROXY names" if of_proxy(error) else ""
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
            f"MLFLOW_EXPERIMENT_ID={experiment_id} can't be used ({first_line(error)}); unset it, or name an "
            "experiment: tracking.experiment=NAME."
        ) from error
    return name


def check_experiment(store: Store, name: str) -> None:
    """Raise InputError if runs can't go to the experiment of this name; it need not exist yet, and isn't made."""
    with refused(store, f"the experiment {name}"):
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
    check_client(f"the MLflow experiment {name}", experiment.artifact_location, another)
    host = urllib.parse.urlsplit(store.uri).hostname
    # Such a server has clients write to a path of their own machine, where nobody finds the files again.
    if store.artifacts is None and host and not _is_this_machine(host) and location.scheme in ("", "file"):
        raise InputError(
            f"the MLflow experiment {name} keeps its artifacts in {experiment.artifact_location}, a folder of "
            f"the server {host} that can't be written to from here; start that server with --artifacts-destination "
            f"and name a new experiment: tracking.experiment=NAME."
        )


def check_client(whose: str, location: str | None, otherwise: str = "") -> None:
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


def experiment_id_of(store: Store, name: str) -> str:
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
