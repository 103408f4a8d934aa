"""A parent run for sweeps of other sweepers than qexp's, which choose their jobs (trials) as they go.

Cheap to import, since `__main__` closes the parent run whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

# Functions that end the open parent run with a status; empty where none is open.
_open: list[Callable[[str], None]] = []


def open_parent(master: DictConfig) -> None:
    """Open the run that all trials become children of.

    master: the configuration that Hydra composed for the sweep; its overrides get the parent's id, for the jobs.
    Raises ConfigError where the sweep's folder has finished runs, InputError where the store can't be used.
    """
    from qexp import tracking
    from qexp.config.composition import Composition
    from qexp.errors import ConfigError
    from qexp.launch import folders, sweep, tracked_run
    from qexp.launch.job import job_from, new_sweep, tags

    folder = Path(master.hydra.sweep.dir).absolute()
    folders.check_free("hydra.sweep.dir", folder, f"**/{folders.RESULT}")
    try:
        job = job_from(Composition.of(master))
    except ConfigError:  # a setting without a value, which the sweeper may set
        return
    store = tracking.connect(job.config.tracking, Path(job.config.outputs), job.cwd)
    experiment = store.experiment_name(job.choices["dataset"])
    tracking.check_experiment(store, experiment)
    tracked_run.warn_of_ignored_variables(sweep=True)
    tracked_run.close_orphans(store)
    title = f"sweep {job.config.study or folder.name}"
    parent = tracking.open_parent(store, experiment=experiment, name=title, tags=tags(job))
    master.hydra.overrides.task += [f"tracking.parent={parent.id}", f"sweep={new_sweep()}"]

    def close(status: str) -> None:
        rows = tracking.children(store, parent.id)
        if status == "FINISHED" and any(row.status != "FINISHED" for row in rows):
            status = "FAILED"
        sweep.close_sweep(store, parent, rows, status, folder, job.config)

    _open.append(close)


def close_parent(status: str) -> None:
    """Close the parent run, if one is open, with the table of its trials."""
    while _open:
        _open.pop()(status)
