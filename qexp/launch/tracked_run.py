"""One job as a run in MLflow: by itself, or in a sweep."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.config import code_digest, identity, validation
from qexp.config.error_messages import exit_with_message
from qexp.config.schema import Config, LogModel, cache_folder
from qexp.errors import ConfigError
from qexp.launch import concurrent, folders, job_process, progress
from qexp.launch.job import Job, tags
from qexp.launch.job_process import JobProcess
from qexp.launch.locations import print_locations
from qexp.launch.rerun import find_earlier
from qexp.launch.signals import stoppable, until_stopped
from qexp.records import WARNING_TAG, Result, RunRecord, Stopped
from qexp.report import formats, sentences, single_run
from qexp.system import cache, machine
from qexp.system.credentials import masked

if TYPE_CHECKING:
    from qexp.tracking.store import Store

log = logging.getLogger(__name__)

# Settings by which `pipeline.input_checks` tells one check from another, beside those of `calib`.
CHECKED = ("dataset", "model", "train", "flow", "fusion", "engine", "runtimes", "latency", "compute")


def run(job: Job) -> float | None:
    """Hydra's task function: run a job, by itself or in a sweep, as a run in MLflow, and return the objective."""
    if job.config.sweep is not None and not job.foreign:
        with stoppable():
            objective: float | None = concurrent.perform(job.number, track_swept(job))
            return objective
    if not job.alone:  # a job of another sweeper, which handles its errors
        return run_single(job)
    with exit_with_message(), until_stopped():
        return run_single(job)


def run_single(job: Job) -> float | None:
    """Run a job by itself, after its configuration, the tracking server and its inputs were checked."""
    from qexp import tracking

    validation.check(job.config)
    if job.config.racing:
        raise ConfigError(
            "racing=true: only the runs of a sweep can be compared while they run; add -m, with settings to compare, "
            "or leave racing out."
        )
    if job.foreign:
        folders.check_free("hydra.sweep.subdir", job.folder)
    job_process.start_server(pt2e=bool(job.config.flow.packages))
    store = tracking.connect(job.config.tracking, Path(job.config.outputs), job.cwd)
    tracking.send_unsent(store, Path(job.config.outputs))
    close_orphans(store)
    earlier = find_earlier(store, job)
    if earlier:
        job = earlier.job
    experiment = store.experiment_name(job.choices["dataset"])
    tracking.check_run(store, experiment=experiment, params=job.params, resume=job.alone)
    if job.alone:
        warn_of_ignored_variables(sweep=False)
    job_process.check_inputs_in_child([job.config])
    row, handle = concurrent.perform(job.number, track(job, swept=identity.GROUPS if earlier else ()))
    print(f"\n{single_run.summary(row, formats.columns())}\n")
    if earlier:
        print(f"{earlier.compared(row)}\n")
    print_locations(job.folder, tracking.ui(store, handle))
    return row.metrics.get(job.config.objective)


def warn_of_ignored_variables(sweep: bool) -> None:
    """Log a warning for each of MLflow's environment variables that is set and has no effect."""
    from qexp import tracking

    for sentence in tracking.ignored(sweep):
        log.warning(sentence)


def close_orphans(store: Store) -> None:
    """Close, as KILLED, the runs that ended processes of this machine left open, and log their names."""
    from qexp import tracking

    closed = tracking.close_orphans(store)
    if closed:
        names = ", ".join(repr(row.name) for row in closed[:3]) + (", …" if len(closed) > 3 else "")
        log.warning("%d runs whose process is gone were still open, and are closed as KILLED: %s.", len(closed), names)


def track_swept(job: Job) -> Generator[JobProcess, Result | Stopped, float | None]:
    """As `track`, for a job of a sweep: print its line and advance the bar when it ends, and return the objective."""
    try:
        if not progress.in_owner():
            check_here(job)
        row, _ = yield from track(job, swept=identity.GROUPS)
    except Exception as error:
        row = failed(job.name, error)
        progress.report(f"#{job.number + 1}  {single_run.failures([row])}", row)
        raise
    progress.report(f"#{job.number + 1}  {single_run.line(row)}", row)
    return row.metrics.get(job.config.objective)


def check_here(job: Job) -> None:
    """Check what a job of a sweep needs where a launcher has started it, which may be another machine than that where
    the sweep was checked: there, before the first job that needs the same. Raises InputError where its inputs are not
    there, and logs what it finds of the processor."""
    from qexp import tracking

    threads, cores, here = job.config.compute.threads, machine.allowed_cores(), machine.host()
    if threads > cores:
        log.warning("compute.threads=%d: %s has %d cores for this job, which they share.", threads, here, cores)
    store = tracking.connect(job.config.tracking, Path(job.config.outputs), job.cwd, known=True)
    sweep, _ = tracking.find(store, job.config.tracking.parent or "")
    if sweep.tags.get("host") == here:
        return
    cpu = machine.describe().cpu
    if sweep.tags.get("cpu") not in (None, cpu):
        log.warning(
            "this job is on %s, whose processor is %s, and the sweep was started on %s with %s: a report compares no "
            "figures of the two.", here, cpu, sweep.tags.get("host"), sweep.tags["cpu"],
        )  # fmt: skip

    def check() -> float:
        job_process.check_inputs_in_child([job.config])
        return 1.0

    cache.number(cache_folder(job.config), _checked_key(job.config), check)


def _checked_key(config: Config) -> str:
    """The key in the cache of the check on this host of what a job of a sweep needs, which is made once."""
    settings = identity.plain(config)
    looked_at = {name: settings[name] for name in CHECKED}
    looked_at["calib"] = {**settings["calib"], "seed": None}
    return json.dumps(
        ["checked", config.sweep, machine.host(), machine.boot(), machine.allowed_cores(), looked_at], sort_keys=True
    )


def track(job: Job, swept: Collection[str] = ()) -> Generator[JobProcess, Result | Stopped, tuple[RunRecord, Any]]:
    """Run the job as a run in MLflow, which ends as FINISHED, FAILED or KILLED whatever happens, as
    KILLED where racing stopped it, too.

    Starts the job's process, yields it, and is sent its result or thrown its error (see `concurrent.perform`). swept:
    the settings that a sweep may vary. Returns the run's record and its handle.
    """
    from qexp import tracking

    validation.check(job.config, swept)
    store = tracking.connect(job.config.tracking, Path(job.config.outputs), job.cwd, known=True)
    tracking.send_unsent(store, Path(job.config.outputs))
    with tracking.start_run(
        store,
        experiment=store.experiment_name(job.choices["dataset"]),
        name=job.name,
        params=job.params,
        tags={**tags(job), **code_digest.tags(job.config)},
        parent=job.config.tracking.parent,
        resume=job.alone,
    ) as handle:
        # Before the job starts, so that a run that fails or is killed can be repeated too.
        handle.log_artifacts({"config.json": identity.plain(job.config)})
        process = job_process.start(job.config, job.folder)
        try:
            result = yield process
        finally:
            process.end()
        if isinstance(result, Stopped):
            outcome = tracking.Outcome(result.metrics, result.tags, {}, [], result.resolved, status="KILLED")
            tracking.deliver(handle, outcome, Path(job.config.outputs))
            return _record(handle.id, job, "KILLED", result, result.tags), handle
        warnings = {WARNING_TAG + warning.code: sentences.warning(warning) for warning in result.warnings}
        found = {**result.tags, **result.verdict.tags(), **warnings}
        files = {name: Path(path) for name, path in result.files.items()}
        if job.hydra_files is not None and job.hydra_files.is_dir():
            files["hydra"] = job.hydra_files
        log_model = job.config.tracking.log_model
        if log_model is LogModel.none or (log_model is LogModel.auto and not job.alone):
            files.pop("model")
        if log_model is LogModel.flavor:
            uri = handle.log_model(**result.flavor, registered=job.config.tracking.registered_model)
            if job.alone:
                where = f"MLFLOW_TRACKING_URI={masked(store.uri)}"
                log.info("MLflow serves the INT8 model: %s mlflow models serve -m %s --env-manager local", where, uri)
        used = [tracking.DatasetUse(**use) for use in result.datasets]
        outcome = tracking.Outcome(result.metrics, found, files, used, result.resolved)
        tracking.deliver(handle, outcome, Path(job.config.outputs))
    return _record(handle.id, job, "FINISHED", result, found), handle


def _record(run_id: str, job: Job, status: str, result: Result | Stopped, found: dict[str, str]) -> RunRecord:
    params = {**job.params, **result.resolved}
    return RunRecord(run_id, job.name, status, params=params, metrics=result.metrics, tags={**tags(job), **found})


def failed(name: str, error: Exception) -> RunRecord:
    """The record of a job that has failed."""
    from qexp import tracking

    return RunRecord("", name, "FAILED", tags={"error": tracking.sentence(error)})
