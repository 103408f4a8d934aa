"""A sweep: every job is checked before the first starts; then the parent run, the table, signals, the exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from qexp.launch.job import Job, command, new_sweep, tags
from qexp.launch.locations import print_locations
from qexp.launch.planning import Planned, exclude_from_dirname, may_be_pt2e, plan
from qexp.launch.signals import Stop, stoppable, until_stopped
from qexp.launch.study import Study, find_study
from qexp.launch.tracked_run import close_orphans, failed, warn_of_ignored_variables
from qexp.records import RunRecord
from qexp.system import machine

if TYPE_CHECKING:
    from qexp.tracking.run import Run
    from qexp.tracking.store import Store

log = logging.getLogger(__name__)


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
        # It imports torch while this process composes the jobs and imports MLflow.
        job_process.start_server(may_be_pt2e(master, [*params, *typed]))
        exclude_from_dirname(master)
        composer = Composer(master, loader)
        return launch(master, composer, plan(composer, params, typed), launcher, batch_size)


def launch(
    master: DictConfig, composer: Composer, planned: Sequence[Planned], launcher: Any, batch_size: int | None
) -> Any:
    """Open the parent run, launch the jobs, close the parent with the table, and exit with 1 where a job failed."""
    place = prepare(master, composer, planned)
    place.study = find_study(place.store, planned, place.experiments)
    left = place.study.to_run(planned)
    if left:
        job_process.check_inputs_in_child([item.job.config for item in left])
    every = place.claim(left)
    total = f"{len(planned)} job{'s' if len(planned) > 1 else ''}"
    with opened(place, launcher, planned[0].job, total) as sweep, progress.bar(len(planned), len(planned) - len(left)):
        sweep.planned += planned
        sweep.launch(every, batch_size)
    return sweep.returns


@dataclass
class Place:
    """The places where a sweep's runs and files go.

    experiments: of MLflow, that its runs go to, the parent first; folder: absolute; study: what earlier sweeps of it
    have done; claimed: names of the folders within `folder` that are kept for its jobs.
    """

    master: DictConfig
    composer: Composer
    store: Store
    experiments: list[str]
    folder: Path
    study: Study = field(default_factory=Study)
    claimed: list[str] = field(default_factory=list)

    def claim(self, planned: Sequence[Planned]) -> list[list[str]]:
        """Make a folder for each job, and return the overrides that compose it. Raises ConfigError."""
        first = len(self.claimed)
        wanted = [self.composer.subfolder(item.overrides, first + number) for number, item in enumerate(planned)]
        names = folders.claim(self.folder, wanted)
        self.claimed += names
        return [
            [*item.overrides, *([f"hydra.sweep.subdir={quoted(name)}"] if name != other else [])]
            for item, name, other in zip(planned, names, wanted, strict=True)
        ]


def prepare(master: DictConfig, composer: Composer, planned: Sequence[Planned]) -> Place:
    """Make the folder of a sweep and find its store, in which runs of processes that are gone are closed.

    planned: jobs of the sweep, among them one of each of its data sets. Raises ConfigError or InputError.
    """
    from qexp import tracking

    first = planned[0].job
    folder = Path(os.path.abspath(master.hydra.sweep.dir))  # noqa: PTH100  (as Hydra does, links are not followed)
    folders.make_writable(folder)
    store = tracking.connect(first.config.tracking, Path(first.config.outputs), first.cwd)
    experiments = sorted({store.experiment_name(item.job.choices["dataset"]) for item in planned})
    for name in experiments:
        tracking.check_experiment(store, name)
    warn_of_ignored_variables(sweep=True)
    tracking.send_unsent(store, Path(first.config.outputs))
    close_orphans(store)
    return Place(master, composer, store, experiments, folder)


@dataclass
class Sweep:
    """An open sweep. planned: its jobs so far, those that are reused among them; returns: what the launcher returned.

    at_a_time: jobs that Hydra's own launcher runs at a time; launched: the number of jobs that the launcher got;
    identifier: given to all of its jobs.
    """

    place: Place
    launcher: Any
    parent: Run
    at_a_time: int
    identifier: str = field(default_factory=new_sweep)
    planned: list[Planned] = field(default_factory=list)
    returns: list[Any] = field(default_factory=list)
    launched: int = 0

    def launch(self, jobs: Sequence[Sequence[str]], batch_size: int | None = None) -> None:
        """Run these jobs, and return when all of them have ended.

        jobs: the overrides of each; batch_size: the most jobs that the launcher gets at once.
        """
        every = [[*job, f"tracking.parent={self.parent.id}", f"sweep={self.identifier}"] for job in jobs]
        # Another launcher has processes of its own, each of which runs its jobs one by one.
        count = self.at_a_time if isinstance(self.launcher, BasicLauncher) else 1
        first, batches = self.launched, []
        with concurrent.at_a_time(count) as running:
            for chunk in BasicSweeper.split_overrides_to_chunks(every, batch_size) if every else []:
                batches.append(self.launcher.launch(chunk, initial_job_idx=self.launched))
                self.returns.append(batches[-1])
                self.launched += len(batches[-1])
        if not isinstance(self.launcher, BasicLauncher):
            self._close_lost()
        for number, returned in enumerate((one for batch in batches for one in batch), first):
            running.complete(number, returned)

    def _close_lost(self) -> None:
        """Close the runs of jobs that a launcher has lost, with their worker or its whole machine, and log them."""
        from qexp import tracking

        for row in tracking.close_lost(self.place.store, self.place.experiments, self.identifier):
            log.warning("%s was lost: %s To run what is missing:\n  %s", row.name, row.tags["error"], command())

    def rows(self) -> list[RunRecord]:
        """The runs of its jobs so far, those of failed jobs and those that are reused among them."""
        from qexp import tracking

        place = self.place
        rows = place.study.new(tracking.children(place.store, self.parent.id, place.experiments))
        tracked_names = {row.name for row in rows}
        rows += [
            row
            for batch in self.returns
            for row in map(failed_before_run, batch)
            if row and row.name not in tracked_names
        ]
        return place.study.with_reused(self.planned, rows)


@contextlib.contextmanager
def opened(place: Place, launcher: Any, first: Job, total: str) -> Iterator[Sweep]:
    """Open the parent run of a sweep; at the end of the context close it with the report of its jobs.

    first: one of its jobs; total: how many there are, in words. Exits with status 1 where a job failed, and with 128 +
    the signal's number where it was stopped.
    """
    from qexp import tracking

    warn_of_cores(launcher, first.config)
    folders.save_beside(place.folder / "multirun.yaml", as_yaml(place.master))
    title = " ".join(dict.fromkeys((tags(first).get("experiment", "sweep"), first.config.study or place.folder.name)))
    try:
        known = {**tags(first), "cpu": machine.describe().cpu}
        parent = place.study.open(place.store, experiment=place.experiments[0], name=title, tags=known)
    except BaseException:
        folders.remove_unused(place.folder, place.claimed)
        raise
    print(f"{total}; runs go to the MLflow experiment {place.experiments[0]}, under {parent.name!r}.", flush=True)
    sweep = Sweep(place, launcher, parent, first.config.job.at_a_time)
    status, code = "FINISHED", 0
    try:
        with stoppable():
            yield sweep
    except Stop as stop:
        status, code = "KILLED", stop.code
    except BaseException:
        status = "FAILED"
        raise
    finally:
        folders.remove_unused(place.folder, place.claimed)
        tracking.send_unsent(place.store, Path(first.config.outputs))
        rows = sweep.rows()
        if status == "FINISHED" and any(row.status != "FINISHED" and not row.raced_out for row in rows):
            status, code = "FAILED", 1
        close_sweep(place.store, parent, rows, status, place.folder, first.config)
    if status == "KILLED":
        finished = sum(row.status == "FINISHED" or row.raced_out for row in rows)
        print(f"Stopped after {finished} of {total}. To run it again:\n  {command()}", file=sys.stderr)
    if code:
        sys.exit(code)


def close_sweep(
    store: Store, parent: Run, rows: Sequence[RunRecord], status: str, folder: Path, config: Config
) -> None:
    """End a sweep's run, make the report of its jobs, and print what it says and where everything is."""
    from qexp import tracking

    counts = Counter("stopped" if row.raced_out else row.status.lower() for row in rows)
    statuses = ("finished", "failed", "killed", *(["stopped"] if counts["stopped"] else []))
    tracking.close_parent(parent, status, {name: counts[name] for name in statuses})
    said, view = sweep_report.report(store, parent, rows, config)
    print(f"\n{said}\n")
    print_locations(folder, tracking.ui(store, parent, view))


def at_a_time(launcher: Any, config: Config) -> int | None:
    """The number of jobs that a launcher runs at the same time on this machine, None where that isn't known here."""
    if isinstance(launcher, BasicLauncher):
        return config.job.at_a_time
    workers: int | None = getattr(launcher, "joblib", {}).get("n_jobs")
    return machine.allowed_cores() + 1 + workers if workers is not None and workers < 0 else workers


def warn_of_cores(launcher: Any, config: Config) -> None:
    """Log a warning where jobs that run at the same time have more threads than this machine has cores.

    Not for the two of Hydra's own launcher, one of which reads and writes while the other computes.
    """
    jobs, threads, cores = at_a_time(launcher, config), config.compute.threads, machine.allowed_cores()
    own = isinstance(launcher, BasicLauncher)
    if jobs is None or jobs * threads <= cores or (own and jobs <= 2):
        return
    setting = "job.at_a_time" if own else "hydra.launcher.n_jobs"
    log.warning(
        "%s=%d with compute.threads=%d: %d threads compute at a time on %d cores, which is slower than no more threads "
        "than cores; lower one of the two.", setting, jobs, threads, jobs * threads, cores,
    )  # fmt: skip


def failed_before_run(returned: Any) -> RunRecord | None:
    """The record of a failed job, for one that failed before it had a run; None for a job that did not fail."""
    if returned.status is JobStatus.COMPLETED:
        return None
    given = OverridesParser.create().parse_overrides(list(returned.overrides))
    name = next((str(one.value()) for one in given if one.key_or_group == "tracking.name"), "job")
    return failed(name, returned._return_value)
