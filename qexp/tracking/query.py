"""Runs read from MLflow; and the two changes to ended runs: a new parent (`adopt`), and KILLED for those whose process
is gone (`close_orphans`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import requests
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from qexp.errors import InputError
from qexp.records import PARENT_TAG, RunRecord
from qexp.system import machine
from qexp.system.credentials import masked
from qexp.tracking.errors import first_line, refused
from qexp.tracking.store import Store, check_client
from qexp.tracking.values import SWEEP_TAG

PAGE = 500


def children(store: Store, parent: str, experiments: Sequence[str] = ()) -> list[RunRecord]:
    """The runs of a sweep in the order they started, all pages of them.

    experiments: names of the experiments that they are in; by default, the parent's own.
    """
    with refused(store, "a search"):
        ids = _ids(store, experiments) if experiments else [store.client.get_run(parent).info.experiment_id]
        return _search(store, ids, f"tags.`{PARENT_TAG}` = '{parent}'")


def of_study(store: Store, study: str, experiments: Sequence[str]) -> list[RunRecord]:
    """The runs with this tag `study`, the sweeps' own among them, in the order they started; none that was deleted."""
    with refused(store, "a search"):
        return _search(store, _ids(store, experiments), f"tags.study = {_literal(study)}")


@dataclass(frozen=True)
class Selection:
    """Runs chosen for a report, in the order in which they started, and a name for them all: of their sweep, of their
    study, or the filter. parent: the sweep's own run, where they are of one."""

    name: str
    records: tuple[RunRecord, ...]
    parent: RunRecord | None = None


def find_runs(
    store: Store, *, sweep: str | None = None, study: str | None = None, filter: str | None = None
) -> Selection:
    """The runs of a sweep (by its run's id or name; of several of this name, the latest), of a study, or that an MLflow
    filter selects; of the latest sweep where none is given.

    They are looked for in the experiment that the settings name, else in all. Without sweeps' own runs, deleted ones,
    and those that a later one replaces. Raises InputError where there are none.
    """
    where = masked(store.uri)
    with refused(store, f"the filter {filter}" if filter else "a search"):
        experiments = _ids(store, [store.experiment]) if store.experiment else _experiments(store)
        if filter or study:
            condition = filter or f"tags.study = {_literal(study or '')}"
            rows = _search(store, experiments, condition)
            jobs = tuple(latest([row for row in rows if SWEEP_TAG not in row.tags]))
            if not jobs:
                raise InputError(
                    f"MLflow at {where} has no run with {f'filter={filter}' if filter else f'study={study}'}."
                )
            return Selection(filter or study or "", jobs)
        sweeps = _search(store, experiments, f"tags.`{SWEEP_TAG}` = 'true'")
        named = [row for row in sweeps if sweep in (None, row.run_id, row.name)]
        if not named:
            known = ", ".join(repr(row.name) for row in sorted(sweeps, key=_last_active)[-3:])
            if not sweeps:
                raise InputError(
                    f"MLflow at {where} has no sweep; run one first, or give study=NAME or filter=CONDITION."
                )
            raise InputError(
                f"MLflow at {where} has no sweep={sweep}, neither an id nor a name; the latest are {known}."
            )
        parent = max(named, key=_last_active)
        jobs = tuple(latest(_search(store, experiments, f"tags.`{PARENT_TAG}` = '{parent.run_id}'")))
        return Selection(parent.name, jobs, parent)


def _last_active(record: RunRecord) -> float:
    return max(record.start, record.end or 0)


def latest(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs without those that a later, finished run of the same configuration on the same CPU replaces: repeated
    since the code has changed, or since they had failed. records: in the order in which they started."""
    replaced: set[tuple[str, ...]] = set()
    kept = []
    for record in reversed(records):
        config, cpu = record.tags.get("config_hash", ""), record.tags.get("cpu", "")
        is_finished = record.status == "FINISHED"
        if config and ((config, cpu) if is_finished else (config,)) in replaced:
            continue
        if config and is_finished:
            replaced |= {(config,), (config, cpu)}
        kept.append(record)
    return kept[::-1]


def _ids(store: Store, experiments: Sequence[str]) -> list[str]:
    found = [store.client.get_experiment_by_name(name) for name in experiments]
    return [experiment.experiment_id for experiment in found if experiment is not None]


def _search(store: Store, experiment_ids: Sequence[str], condition: str) -> list[RunRecord]:
    """All pages of it, in the order in which the runs started."""
    records: list[RunRecord] = []
    token: str | None = None
    while experiment_ids:
        with _no_gc():
            page = store.client.search_runs(
                list(experiment_ids),
                condition,
                max_results=PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
        records.extend(record_of(run) for run in page)
        token = page.token
        if not token:
            break
    return records


@contextmanager
def _no_gc() -> Iterator[None]:
    """Without garbage collection: MLflow makes an object of each param, metric and tag, and looking through them again
    and again is more than half of a search's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _literal(text: str) -> str:
    """A string in a condition of MLflow's, which knows no escapes."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def adopt(store: Store, parent: str, records: Sequence[RunRecord]) -> None:
    """Make `parent` the parent of those runs that have none, or a deleted one."""
    by_parent: dict[str, list[RunRecord]] = {}
    for record in records:
        by_parent.setdefault(record.tags.get(PARENT_TAG, ""), []).append(record)
    with refused(store, "a parent of runs"):
        for former, its in by_parent.items():
            if former != parent and not (former and _exists(store, former)):
                for record in its:
                    store.client.set_tag(record.run_id, PARENT_TAG, parent)


def _exists(store: Store, run_id: str) -> bool:
    try:
        return bool(store.client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def close_orphans(store: Store) -> list[RunRecord]:
    """Close as KILLED the runs that ended processes of this machine left open. Returns them.

    Runs of other machines, and those whose process runs or may do so, are left alone.
    """
    with refused(store, "a search"):
        experiments = _experiments(store)
        mine = _search(store, experiments, f"attributes.status = 'RUNNING' and tags.host = {_literal(machine.host())}")
        return _closed(store, [record for record in mine if not has_process(record)])


def close_lost(store: Store, experiments: Sequence[str], sweep: str) -> list[RunRecord]:
    """Close as KILLED the runs of a sweep that are open though all its jobs have ended, on whatever machine. Returns
    them.

    experiments: names of those that the runs are in; sweep: the identifier that all of its jobs have.
    """
    with refused(store, "a search"):
        condition = f"attributes.status = 'RUNNING' and tags.sweep_id = {_literal(sweep)}"
        return _closed(store, _search(store, _ids(store, experiments), condition))


def _closed(store: Store, gone: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of the runs, whose processes are gone, that were still open; they are closed as KILLED."""
    # One may have ended by itself since the search; now that its process is gone, nobody else ends it.
    left = [record for record in gone if store.client.get_run(record.run_id).info.status == "RUNNING"]
    closed = []
    for record in left:
        error = f"process {record.tags['pid']} on {record.tags['host']} ended without closing the run."
        store.client.set_tag(record.run_id, "error", error)
        store.client.set_terminated(record.run_id, "KILLED")
        closed.append(replace(record, status="KILLED", tags={**record.tags, "error": error}))
    return closed


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


def has_process(record: RunRecord) -> bool:
    """True if the process of a run of this host runs, or where that can't be known."""
    boot = machine.boot()
    if record.tags.get("boot", boot) != boot:  # the system was started again since
        return False
    try:
        return machine.is_running(int(record.tags["pid"]), float(record.tags["pid_started"]))
    except (KeyError, ValueError):  # not as this module writes them
        return True


def find(store: Store, run_id: str) -> tuple[RunRecord, str]:
    """The run of this id, and the name of its experiment. Raises InputError where there is none."""
    try:
        run = store.client.get_run(run_id)
        return record_of(run), store.client.get_experiment(run.info.experiment_id).name
    except (MlflowException, requests.RequestException) as error:
        raise InputError(f"there is no run {run_id} in MLflow at {masked(store.uri)}: {first_line(error)}.") from error


def fetch(store: Store, run_id: str, name: str, folder: Path) -> Path | None:
    """A copy, in `folder`, of the artifact of this name at the top of a run; None where the run has none."""
    with refused(store, f"the artifacts of run {run_id}"):
        check_client(f"the run {run_id}", store.client.get_run(run_id).info.artifact_uri)
        if name not in {file.path for file in store.client.list_artifacts(run_id)}:
            return None
        return Path(store.client.download_artifacts(run_id, name, str(folder)))


def record_of(run: MlflowRun) -> RunRecord:
    info, data = run.info, run.data
    end = info.end_time / 1000 if info.end_time else None
    start = info.start_time / 1000
    return RunRecord(
        info.run_id,
        info.run_name,
        info.status,
        start,
        end,
        data.params,
        data.metrics,
        data.tags,
        info.artifact_uri or "",
    )
