"""A run in MLflow: opened, filled and ended, by itself or as the parent of a sweep's."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.onnx import save_model
from mlflow.types.schema import Schema, TensorSpec

from qexp.errors import InputError, RunError, without_values
from qexp.metrics import Metric as MetricName
from qexp.records import PARENT_TAG, RunRecord
from qexp.system import machine, machine_lock
from qexp.system.credentials import masked
from qexp.tracking.errors import first_line, in_thread, is_lost, refused, root_cause, sentence
from qexp.tracking.query import has_process, record_of
from qexp.tracking.store import Store, check_client, check_experiment, experiment_id_of
from qexp.tracking.values import (
    SWEEP_TAG,
    cut_params,
    cut_tags,
    json_value,
    long_params,
    requirement,
    system_tags,
    with_legal_names,
    write_artifact,
)

log = logging.getLogger(__name__)


PARAMS_AT_ONCE = 100  # what MLflow takes in one request
INPUT_ATTEMPTS = 10  # how often runs that record the same data sets for the first time may come in between
END_SECONDS = 15.0  # how long an ending run waits for its server


@dataclass(frozen=True)
class DatasetUse:
    """Images that a run used. source: folder, URL or import path; context: what for (`calibration`, `evaluation`)."""

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, Any] = field(default_factory=dict)


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
        at: int | None = None,
    ) -> None:
        """Log what came out, in few requests.

        metrics: those that are not finite are left out, and named in the tag `not_finite`.
        artifacts: by path in the run: a file or folder, or a text, or something to write as JSON.
        at: the metrics' time in ms since the epoch, now by default; with the same one they can be logged again.
        Raises RunError if the store does not take it.
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        left_out = {name: value for name, value in metrics.items() if name not in finite}
        all_tags = dict(tags or {})
        if left_out:
            all_tags["not_finite"] = ", ".join(f"{name}={value}" for name, value in left_out.items())
        with self._taking("the results"):
            self._log_batch(finite, params, all_tags, at)
            if datasets:
                self._log_inputs([_dataset_input(use) for use in datasets])
        self.log_artifacts({**long_params(params or {}), **(artifacts or {})})

    def log_params(self, params: Mapping[str, str], tags: Mapping[str, str] | None = None) -> None:
        """Log params and tags.

        A param too long for MLflow is cut where it says so, and stands whole in `long_params.json`.
        """
        with self._taking("the params"):
            self._log_batch(params=params, tags=tags)
        self.log_artifacts(long_params(params))

    def log_artifacts(self, artifacts: Mapping[str, Path | str | Mapping[str, Any] | Sequence[Any]]) -> None:
        """Log files, folders, texts and JSON by their path in the run, as one upload."""
        if not artifacts:
            return
        with tempfile.TemporaryDirectory(prefix="qexp-") as folder, self._taking("the artifacts"):
            for path, content in artifacts.items():
                write_artifact(Path(folder) / path, content)
            self.store.client.log_artifacts(self.id, folder)

    def log_model(
        self,
        path: Path,
        *,
        name: str,
        example: np.ndarray,
        classes: int,
        metadata: Mapping[str, Any] | None = None,
        registered: str | None = None,
    ) -> str:
        """Log an ONNX file in MLflow's flavor `onnx`, which `mlflow models serve` executes with ONNX Runtime.

        example: of its input, float32 [1, 3, H, W], which takes any number of images; the output is float32 logits
        [N, classes], by the name that it has in the file. metadata: what a user of the model must know, as mean, std
        and class names. registered: the name in the model registry of which it becomes the newest version; None: it
        isn't registered. Returns its URI, `models:/...`. Raises RunError if it can't be logged.
        """
        import onnx

        content = onnx.load(str(path))
        signature = ModelSignature(
            Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, classes), content.graph.output[0].name)]),
        )
        opset = {"opset": next(one.version for one in content.opset_import if not one.domain)}
        client = self.store.client
        with tempfile.TemporaryDirectory(prefix="qexp-") as folder, self._taking("the model"):
            model = client.create_logged_model(self.experiment_id, name=name, source_run_id=self.id)
            card = Model(artifact_path=model.artifact_location, run_id=self.id, model_id=model.model_id)
            try:
                save_model(
                    content,
                    Path(folder) / "model",
                    mlflow_model=card,
                    signature=signature,
                    input_example=example,
                    # Given, since MLflow would find them out by running the model for 5 s in another process.
                    pip_requirements=[requirement(one) for one in ("mlflow", "onnx", "onnxruntime", "numpy")],
                    onnx_execution_providers=["CPUExecutionProvider"],
                    metadata=json_value({**(metadata or {}), **opset}),
                    save_as_external_data=False,
                )
                client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
                client.finalize_logged_model(model.model_id, "READY")
            except BaseException:
                client.finalize_logged_model(model.model_id, "FAILED")
                raise
            client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
            uri = f"models:/{model.model_id}"
            if registered is None:
                return uri
            with suppress(MlflowException):  # it is there; if it can't be made, neither can its version
                client.create_registered_model(registered)
            # By its folder: MLflow would look its URI up in the process's own store, which need not be this one.
            version = client.create_model_version(registered, model.artifact_location, self.id).version
        return f"models:/{registered}/{version}"

    def finish(self, status: str = "FINISHED") -> None:
        """End with this status. Raises RunError if the store does not take it."""
        with self._taking("the end of the run"):
            self._end(status)

    def fail(self, error: str, trace: str) -> None:
        """End as FAILED, with the sentence as tag `error` and the traceback as an artifact. Never raises."""
        self._end_anyhow("FAILED", lambda: self._log_failure(error, trace))

    def kill(self) -> None:
        """End as KILLED. Raises nothing of its own, and an interrupt while it works doesn't stop it."""
        self._end_anyhow("KILLED")

    def _log_failure(self, error: str, trace: str) -> None:
        self._log_tags({"error": error})
        self.log_artifacts({"traceback.txt": without_values(trace)})

    def _log_tags(self, tags: Mapping[str, str]) -> None:
        self._log_batch(tags=tags)

    def _log_batch(
        self,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        at: int | None = None,
    ) -> None:
        """All in one request, where MLflow takes as many params in one."""
        now = at or int(time.time() * 1000)
        named = [Param(name, value) for name, value in cut_params(params or {}).items()]
        self.store.client.log_batch(
            self.id,
            [Metric(name, value, now, 0) for name, value in with_legal_names(metrics or {}).items()],
            named[:PARAMS_AT_ONCE],
            [RunTag(name, value) for name, value in cut_tags(tags or {}).items()],
        )
        for start in range(PARAMS_AT_ONCE, len(named), PARAMS_AT_ONCE):
            self.store.client.log_batch(self.id, params=named[start : start + PARAMS_AT_ONCE])

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
        if self.status in ("RUNNING", "UNSENT"):
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
            in_thread(work).result(timeout=END_SECONDS)
        except Exception as problem:
            log.warning(
                "MLflow at %s did not take that run %s ended as %s: %s",
                masked(self.store.uri),
                self.name,
                status,
                root_cause(problem) or "no answer",
            )

    @contextmanager
    def _taking(self, what: str) -> Iterator[None]:
        try:
            yield
        except (MlflowException, requests.RequestException, OSError) as error:
            reason = root_cause(error) if is_lost(error) else first_line(error)
            raise RunError(
                f"MLflow at {masked(self.store.uri)} did not take {what} of run {self.name}: {reason}."
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
    system = system_tags(tags, description)
    if parent:
        system[PARENT_TAG] = parent
    resumed = os.environ.get("MLFLOW_RUN_ID") if resume else None
    if resumed:
        check_resumed(store, params, resumed)
    run: Run | None = None
    try:
        with refused(store, f"the run {name}"):
            if resumed:
                run = _opened(store, lambda: _resume(store, resumed, system))
            else:
                experiment_id = experiment_id_of(store, experiment)
                # Complete at once: a resumed sweep knows by its tags which job it was, were it killed the next moment.
                known = {**system, **cut_tags(tags)}
                run = _opened(store, lambda: store.client.create_run(experiment_id, tags=known, run_name=masked(name)))
        run.log_params(params, tags if resumed else None)
    except RunError as error:
        if run is not None:
            run.fail(str(error), traceback.format_exc())
        raise
    except BaseException:
        if run is not None:
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
        raise InputError(f"MLFLOW_RUN_ID={run_id}: MLflow at {shown} has no such run ({first_line(error)}).") from error
    row = record_of(run)
    there = {name: value for name, value in cut_params(params).items() if row.params.get(name, value) != value}
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
    check_client(f"MLFLOW_RUN_ID={run_id}: the run", run.info.artifact_uri, ", or unset it")


def _is_anothers(row: RunRecord) -> bool:
    """True if the run belongs to another process, which isn't known to have ended."""
    if "pid" not in row.tags or "host" not in row.tags:  # `mlflow run` opens it for whom it starts
        return False
    here = row.tags["host"] == machine.host()
    return not here or (row.tags["pid"] != str(os.getpid()) and has_process(row))


def _opened(store: Store, call: Callable[[], MlflowRun]) -> Run:
    """The run that `call` opens; none is left open after an interrupt."""
    opened = in_thread(call)
    try:
        with suppress(TimeoutError):
            opened.exception(timeout=1)
        with nullcontext() if opened.done() else machine_lock.released():  # it waits for a lost server
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
        with refused(store, f"the run {again}"):
            parent = _opened(store, lambda: _resume(store, again, {**system_tags(tags, description), **tags}))
    parent.is_sweep = True
    return parent


def close_parent(parent: Run, status: str, counts: Mapping[str, int]) -> None:
    """End a sweep's run. status: FINISHED, FAILED or KILLED; counts: `finished`, `failed`, ..., logged as `jobs/...`.

    Never raises: a sweep whose store has gone still has its report to print.
    """
    jobs = {MetricName.jobs.of(name): float(count) for name, count in counts.items()}
    parent._end_anyhow(status, lambda: parent.log_result(jobs))


def describe_parent(parent: Run, note: str, files: Path | None = None) -> None:
    """Give a sweep's run a description in Markdown, and the files in a folder as its artifact `report`.

    Raises RunError if the store does not take them.
    """
    parent.log_result({}, {"mlflow.note.content": note}, {"report": files} if files else {})


def _dataset_input(use: DatasetUse) -> DatasetInput:
    scheme = urllib.parse.urlsplit(use.source).scheme
    where = masked(use.source)
    kind, source = ("http", {"url": where}) if scheme in ("http", "https") else ("local", {"uri": where})
    dataset = Dataset(
        name=use.name[:500],
        digest=use.digest[:36],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(json_value(use.profile)),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", use.context)])
