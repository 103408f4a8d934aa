"""Files of runs, read from wherever MLflow keeps them."""

from __future__ import annotations

import io
import logging
import tempfile
import urllib.parse
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from qexp.records import SAME_TAG, RunRecord, Top1, same_from_text
from qexp.tracking.errors import refused
from qexp.tracking.store import Store, check_client

log = logging.getLogger(__name__)

THREADS = 16  # most of the time is a server's


def artifacts(store: Store, records: Sequence[RunRecord], name: str) -> dict[str, bytes]:
    """The content of the artifact of this name of each run that has one, by run id.

    name: its path in the run. Files on this machine are read where they are, all others by several threads through
    MLflow's clients. Raises InputError where a server, or the client for its artifacts, can't be used.
    """

    def content(record: RunRecord) -> bytes | None:
        where = record.artifacts or store.client.get_run(record.run_id).info.artifact_uri
        if urllib.parse.urlsplit(where).scheme in ("", "file"):
            return _of_file(Path(local_file_uri_to_path(where)) / name)
        return _of_repository(store, where, name)

    tracked = [record for record in records if record.run_id]
    with refused(store, f"the artifacts {name}"), ThreadPoolExecutor(THREADS) as threads:
        for where in {record.artifacts.rpartition(record.run_id)[0] for record in tracked if record.artifacts}:
            check_client("the sweep", where)
        found = {record.run_id: read for record, read in zip(tracked, threads.map(content, tracked), strict=True)}
    return {run_id: read for run_id, read in found.items() if read is not None}


def _of_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _of_repository(store: Store, where: str, name: str) -> bytes | None:
    """None where the run has no such artifact: only once a download has failed is it worth a question."""
    repository = get_artifact_repository(where, tracking_uri=store.uri)
    with tempfile.TemporaryDirectory(prefix="qexp-") as folder:
        try:
            return Path(repository.download_artifacts(name, folder)).read_bytes()
        except Exception:
            if name in {file.path for file in repository.list_artifacts(name.rpartition("/")[0] or None)}:
                raise
            return None


def top1(store: Store, records: Sequence[RunRecord]) -> dict[str, Top1]:
    """The predicted classes of each run that has them, by run id."""
    contents = artifacts(store, records, "top1.npz")
    found: dict[str, Top1] = {}
    for record in records:
        if record.run_id in contents:
            try:
                with np.load(io.BytesIO(contents[record.run_id]), allow_pickle=False) as arrays:
                    same = same_from_text(record.tags.get(SAME_TAG, ""))
                    found[record.run_id] = Top1.from_arrays(dict(arrays), same)
            except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
                log.warning("top1.npz of run %s can't be read (%s), and is left out.", record.name, error)
    return found
