"""A sweep: every job is checked before the first starts; then the parent run, the table, signals, the exit status."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import DictConfig

from qexp.config.composition import Composer, as_yaml, quoted
from qexp.config.error_messages import exit_with_message
from qexp.config.schema import Config
from qexp.launch import concurrent, folders, job_process, progress, sweep_report
from qexp.launch.job import command, new_sweep, tags
from qexp.launch.locations import print_locations
from qexp.launch.planning import Planned, exclude_from_dirname, plan
from qexp.launch.signals import Stop, stoppable, until_stopped
from qexp.launch.study import find_study
from qexp.launch.tracked_run import close_orphans, failed, warn_of_ignored_variables
from qexp.records import RunRecord

if TYPE_CHECKING:
    from qexp.tracking.run import Run
    from qexp.tracking.store import Store


def run_sweep(
    master: DictConfig, params: Sequence[str], typed: Sequence[str], loader: Any, launcher: Any, batch_size: int | None
) -> Any:
    """Run a sweep, whose jobs are the combinations of the overrides' values, and return what the launcher returns.

    params: the sweep's own overrides (`hydra.sweeper.params`, as a ready study has them); typed: those of the command
    line, which replace the sweep's own of the same setting; batch_size: the most jobs that the launcher gets at once.
    All jobs, and the inputs of each distinct one, are checked before the parent run is opened and the first job
    launched. Exits with status 1 where a job failed, and with 128 + the signal's number where it was stopped.
    """
    with exit_with_message(), until_stopped():
        job_process.start_server()  # imports torch while this process composes the jobs and imports MLflow
        exclude_from_dirname(master)
        composer = Composer(master, loader)
        return launch(master, composer, plan(composer, params, typed), launcher, batch_size)


def launch(
    master: DictConfig, composer: Composer, planned: Sequence[Planned], launcher: Any, batch_size: int | None
) -> Any:
    """Open the parent run, launch the jobs, close the parent with the table, and exit with 1 where a job failed."""
    from qexp import tracking

    first = planned[0].job
    folder = Path(os.path.abspath(master.hydra.sweep.dir))  # noqa: PTH100  (as Hydra does, links are not followed)
    folders.make_writable(folder)
    store = tracking.connect(first.config.tracking, Path(first.config.outputs), first.cwd)
    experiments = sorted({store.experiment_name(item.job.choices["dataset"]) for item in planned})
    for name in experiments:
        tracking.check_experiment(store, name)
    warn_of_ignored_variables(sweep=True)
    close_orphans(store)
    study = find_study(store, planned, experiments)
    left = study.to_run(planned)
    if left:
        job_process.check_inputs_in_child([item.job.config for item in left])
    wanted = [composer.subfolder(item.overrides, number) for number, item in enumerate(left)]
    claimed = folders.claim(folder, wanted)
    folders.save_beside(folder / "multirun.yaml", as_yaml(master))

    title = " ".join(dict.fromkeys((tags(first).get("experiment", "sweep"), first.config.study or folder.name)))
    try:
        parent = study.open(store, experiment=experiments[0], name=title, tags=tags(first))
    except BaseException:
        folders.remove_unused(folder, claimed)
        raise
    all_jobs = f"{len(planned)} job{'s' if len(planned) > 1 else ''}"
    print(f"{all_jobs}; runs go to the MLflow experiment {experiments[0]}, under {parent.name!r}.", flush=True)
    sweep = new_sweep()
    returns: list[Any] = []
    status, code = "FINISHED", 0
    try:
        with stoppable(), progress.bar(len(planned), len(planned) - len(left)):
            every = [[*item.overrides, f"tracking.parent={parent.id}", f"sweep={sweep}"] for item in left]
            for overrides, name, other in zip(every, claimed, wanted, strict=True):
                overrides += [f"hydra.sweep.subdir={quoted(name)}"] if name != other else []
            # Another launcher has processes of its own, each of which runs its jobs one by one.
            count = first.config.job.at_a_time if isinstance(launcher, BasicLauncher) else 1
            with concurrent.at_a_time(count) as running:
                for chunk in BasicSweeper.split_overrides_to_chunks(every, batch_size) if left else []:
                    returns.append(launcher.launch(chunk, initial_job_idx=sum(map(len, returns))))
            for number, returned in enumerate(one for batch in returns for one in batch):
                running.complete(number, returned)
    except Stop as stop:
        status, code = "KILLED", stop.code
    except BaseException:
        status = "FAILED"
        raise
    finally:
        folders.remove_unused(folder, claimed)
        rows = study.new(tracking.children(store, parent.id, experiments))
        tracked_names = {row.name for row in rows}
        rows += [
            row for batch in returns for row in map(failed_before_run, batch) if row and row.name not in tracked_names
        ]
        rows = study.with_reused(planned, rows)
        if status == "FINISHED" and any(row.status != "FINISHED" for row in rows):
            status, code = "FAILED", 1
        close_sweep(store, parent, rows, status, folder, first.config)
    if status == "KILLED":
        finished = sum(row.status == "FINISHED" for row in rows)
        print(f"Stopped after {finished} of {all_jobs}. To run it again:\n  {command()}", file=sys.stderr)
    if code:
        sys.exit(code)
    return returns


def close_sweep(
    store: Store, parent: Run, rows: Sequence[RunRecord], status: str, folder: Path, config: Config
) -> None:
    """End a sweep's run, make the report of its jobs, and print what it says and where everything is."""
    from qexp import tracking

    counts = Counter(row.status.lower() for row in rows)
    tracking.close_parent(parent, status, {name: counts[name] for name in ("finished", "failed", "killed")})
    said, view = sweep_report.report(store, parent, rows, config)
    print(f"\n{said}\n")
    print_locations(folder, tracking.ui(store, parent, view))


def failed_before_run(returned: Any) -> RunRecord | None:
    """The record of a failed job, for one that failed before it had a run; None for a job that did not fail."""
    if returned.status is JobStatus.COMPLETED:
        return None
    given = OverridesParser.create().parse_overrides(list(returned.overrides))
    name = next((str(one.value()) for one in given if one.key_or_group == "tracking.name"), "job")
    return failed(name, returned._return_value)
