"""A study: a sweep of it reuses the finished runs of earlier sweeps whose results would be the same today."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qexp.config import identity
from qexp.config.schema import Config
from qexp.launch import job_process
from qexp.records import RACED_FOR_TAG, RunRecord

if TYPE_CHECKING:
    from qexp.launch.planning import Planned
    from qexp.tracking.run import Run
    from qexp.tracking.store import Store

log = logging.getLogger(__name__)

# Tags that a result depends on beside its settings, each with its name in messages.
DEPENDS_ON = {
    "code_hash": "code",
    "checkpoint_digest": "checkpoint",
    "data_digest": "data",
    "calib_digest": "calibration images",
    "kernel_signature": "INT8 kernels",
    "torch": "torch",
    "cpu": "CPU",
}


@dataclass(frozen=True)
class Study:
    """The runs of a study at the start of a sweep of it.

    A study has one parent run for all its sweeps: each of them opens it again. parent: that run's id, None where there
    is none; shared: True while another sweep of the study is open; before: ids of all runs of the study; ended: its
    finished runs by config_hash, the latest last, with `racing` after those that it stopped; finished: those of them
    that are known to give the same results today, by config_hash.
    """

    parent: str | None = None
    shared: bool = False
    before: frozenset[str] = frozenset()
    ended: Mapping[str, Sequence[RunRecord]] = field(default_factory=dict)
    finished: Mapping[str, RunRecord] = field(default_factory=dict)

    def reusing(self, planned: Sequence[Planned]) -> Study:
        """The same study, with those of its finished runs that these jobs can do with; logs how many they are."""
        asked = [item.job.config for item in planned if identity.config_hash(item.job.config) in self.ended]
        done: dict[str, RunRecord] = {}
        changed: dict[str, None] = {}
        for job, today in zip(asked, job_process.provenance_tags_in_child(asked) if asked else [], strict=True):
            key = today["config_hash"]
            differences = [
                (row, differing(row.tags, today, job.latency.enabled) + _asked_otherwise(row, job))
                for row in self.ended[key]
            ]
            same = [row for row, names in differences if not names]
            if same:
                done[key] = same[-1]
            else:
                changed |= dict.fromkeys(differences[-1][1])
        if done:
            log.warning(
                "%d of %d jobs are finished already under study=%s and are not run again; resume=false runs all.",
                len(done), len(planned), planned[0].job.config.study,
            )  # fmt: skip
        if changed:
            again = len(asked) - len(done)
            log.warning("%d were finished under it with another %s, and are run again.", again, ", ".join(changed))
        return replace(self, finished={**self.finished, **done})

    def to_run(self, planned: Sequence[Planned]) -> list[Planned]:
        """The jobs without a finished run to reuse."""
        return [item for item in planned if identity.config_hash(item.job.config) not in self.finished]

    def open(self, store: Store, **given: Any) -> Run:
        """Open the parent run and `adopt` the finished runs. given: as `tracking.open_parent` takes it."""
        from qexp import tracking

        parent = tracking.open_parent(store, again=self.parent, **given)
        try:
            self.adopt(store, parent.id)
        except BaseException:
            parent.kill()
            raise
        return parent

    def adopt(self, store: Store, parent: str) -> None:
        """Put the finished runs that are reused under this sweep's run, where they have none that is left."""
        from qexp import tracking

        tracking.adopt(store, parent, list(self.finished.values()))

    def new(self, rows: Sequence[RunRecord]) -> list[RunRecord]:
        """The parent's runs that this sweep has started."""
        return [row for row in rows if row.run_id not in self.before]

    def with_reused(self, planned: Sequence[Planned], rows: Sequence[RunRecord]) -> list[RunRecord]:
        """This sweep's runs and those that it reuses, in the order in which the jobs were planned.

        Reused runs get the names and params that this sweep gives them, since both depend on the settings swept over.
        """
        rows = list(rows)
        for item in planned:
            row = self.finished.get(identity.config_hash(item.job.config))
            if row is not None:
                resolved = {name: value for name, value in row.params.items() if name.startswith("resolved.")}
                rows.append(replace(row, name=item.name, params={**item.job.params, **resolved}))
        place = {item.name: index for index, item in enumerate(planned)}
        return sorted(rows, key=lambda row: place.get(row.name, len(place)))


def find_study(store: Store, planned: Sequence[Planned], experiments: Sequence[str]) -> Study:
    """Find the runs of the study that these jobs belong to, and log how many are reused."""
    return runs_of_study(store, planned[0].job.config, experiments).reusing(planned)


def runs_of_study(store: Store, config: Config, experiments: Sequence[str]) -> Study:
    """Find the runs of the study that a job with this configuration belongs to; none of them is reused yet."""
    from qexp import tracking

    if not (config.study and config.resume):
        return Study()
    rows = tracking.of_study(store, config.study, experiments)
    # A parent that is still open belongs to another process.
    parents = [row.run_id for row in rows if tracking.SWEEP_TAG in row.tags and row.status != "RUNNING"]
    shared = any(tracking.SWEEP_TAG in row.tags and row.status == "RUNNING" for row in rows)
    if shared:
        log.warning("another sweep of study=%s is open; what it has not finished yet is run here too.", config.study)
    ended: dict[str, list[RunRecord]] = {}
    for row in rows:
        counts = row.status == "FINISHED" or (config.racing and row.raced_out)
        if counts and "config_hash" in row.tags:
            ended.setdefault(row.tags["config_hash"], []).append(row)
    # What was evaluated on all images counts before what racing stopped.
    ended = {key: sorted(found, key=lambda row: row.status == "FINISHED") for key, found in ended.items()}
    return Study(parents[-1] if parents else None, shared, frozenset(row.run_id for row in rows), ended)


def _asked_otherwise(row: RunRecord, job: Config) -> list[str]:
    """The reason for which racing stopped this run, where the job would be stopped by something else."""
    other = row.raced_out and row.tags.get(RACED_FOR_TAG) != identity.raced_for(job)
    return ["question of the report"] * other


def differing(then: Mapping[str, str], now: Mapping[str, str], timed: bool) -> list[str]:
    """Names of what differs among all that a result depends on, from DEPENDS_ON.

    then, now: tags; timed: True if the result depends on the CPU too, and not on its kernels alone.
    """
    names = [tag for tag in DEPENDS_ON if tag != "cpu" or timed]
    return [DEPENDS_ON[tag] for tag in names if then.get(tag) != now.get(tag)]
