"""Waiting for a tracking server that can't be reached for a while, as when it is restarted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from qexp.system import machine_lock
from qexp.system.credentials import masked
from qexp.tracking.errors import is_answered, is_lost, is_refused, root_cause

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two attempts; what lasts less isn't said
BUSY_SECONDS = 60.0  # how long a server that is there may be unable to answer
# Calls that make another thing each time: they aren't made again where a server may have taken them.
ONCE = {"create_logged_model", "create_model_version"}


@dataclass
class Missed:
    """A server that can't be reached. since: by the monotonic clock; said: whether the user was told."""

    since: float = field(default_factory=time.monotonic)
    said: bool = False

    def seconds(self) -> float:
        return time.monotonic() - self.since


# Servers by address: of this process's clients together, so that it waits for each outage once.
_missed: dict[str, Missed] = {}


class PatientClient:
    """MLflow's client, each of whose calls is made again until the server at `uri` can be reached.

    patience: seconds for which a server is waited for; after them each call is made once, and raises what MLflow does.
    """

    def __init__(self, client: MlflowClient, uri: str, patience: float) -> None:
        self._client, self._uri, self._patience = client, uri, patience

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        return partial(self._patiently, call, name not in ONCE) if callable(call) else call

    def create_run(self, experiment_id: str, *, tags: dict[str, str], run_name: str) -> MlflowRun:
        """Make a run, and only one: where the answer to a request is lost, the run that it may have made is taken."""
        start = int(time.time() * 1000)
        attempts = 0

        def create() -> MlflowRun:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                for run in self._client.search_runs([experiment_id], f"attributes.start_time = {start}"):
                    if run.info.run_name == run_name and tags.items() <= run.data.tags.items():
                        return run
            return self._client.create_run(experiment_id, start_time=start, tags=tags, run_name=run_name)

        made: MlflowRun = self._patiently(create, True)
        return made

    def _patiently(self, call: Callable[..., Any], repeatable: bool, *args: Any, **given: Any) -> Any:
        while True:
            try:
                found = call(*args, **given)
            except (MlflowException, requests.RequestException) as error:
                can_repeat = is_lost(error) and (repeatable or is_refused(error))
                if not (can_repeat and self._waits(error)):
                    raise
            else:
                self._found()
                return found

    def _waits(self, error: BaseException) -> bool:
        """Wait a moment and return True; False where the server has been waited for long enough."""
        missed = _missed.setdefault(self._uri, Missed())
        patience = min(self._patience, BUSY_SECONDS) if is_answered(error) else self._patience
        if missed.seconds() >= patience:
            return False
        if missed.seconds() >= POLL_SECONDS and not missed.said:
            missed.said = True
            log.warning(
                "MLflow at %s can't be reached (%s); it is waited for, up to %g s (tracking.patience).",
                masked(self._uri), root_cause(error), patience,
            )  # fmt: skip
        with machine_lock.released():  # another job may time meanwhile
            time.sleep(POLL_SECONDS)
        return True

    def _found(self) -> None:
        missed = _missed.pop(self._uri, None)
        if missed is not None and missed.said:
            log.warning("MLflow at %s is back after %.0f s.", masked(self._uri), missed.seconds())
