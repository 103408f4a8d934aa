"""A search: a sweep whose jobs Optuna chooses, a few at a time, by the results of those before.

Optuna's storage holds the trials, MLflow the runs. A search of a study (`study=NAME`) that was stopped is found in both
by the same command, and goes on as if it had not been stopped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qexp.config import identity
from qexp.config.composition import Composer, quoted
from qexp.config.error_messages import exit_with_message
from qexp.errors import ConfigError
from qexp.launch import job_process, progress
from qexp.launch.goal import Goal, goal_of
from qexp.launch.planning import Planned, checked, exclude_from_dirname, may_be_pt2e, sweep_overrides
from qexp.launch.search_space import SearchSpace, space_of
from qexp.launch.signals import until_stopped
from qexp.launch.study import DEPENDS_ON, runs_of_study
from qexp.launch.sweep import Place, Sweep, opened, prepare
from qexp.system import credentials

if TYPE_CHECKING:
    from qexp.launch.trials import Asked, Trials

log = logging.getLogger(__name__)

# Proposals of the sampler in a row that are no new job, after which a search ends.
PATIENCE = 100


@dataclass(frozen=True)
class Settings:
    """The settings of `hydra.sweeper` (conf/hydra/sweeper/qexp_optuna.yaml)."""

    n_trials: int
    n_jobs: int
    sampler: str
    seed: int
    storage: str


def settings_from(given: Mapping[str, Any], samplers: Collection[str]) -> Settings:
    """The settings that Hydra composed. samplers: the names of those that there are. Raises ConfigError."""
    for name, least in (("n_trials", 1), ("n_jobs", 1), ("seed", 0)):
        value = given[name]
        if type(value) is not int or value < least:
            raise ConfigError(f"hydra.sweeper.{name}={value}: must be a whole number, {least} or more.")
    if given["sampler"] not in samplers:
        raise ConfigError(f"hydra.sweeper.sampler={given['sampler']}: must be one of {', '.join(samplers)}.")
    return Settings(**given)


def run_search(
    master: DictConfig,
    params: Sequence[str],
    typed: Sequence[str],
    loader: Any,
    launcher: Any,
    given: Mapping[str, Any],
) -> Any:
    """Run a search over the values that overrides list, and return what the launcher returned.

    params, typed: the overrides, as `run_sweep` takes them; given: the settings of `hydra.sweeper`. Each value, and the
    inputs that it needs, is checked before the parent run is opened and the first job launched; values that don't go
    together are refused when they are proposed. Exits as `run_sweep` does.
    """
    with exit_with_message(), until_stopped():
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "hydra/sweeper=qexp_optuna: Optuna is not installed; install it by pip install 'qexp[optuna]', or "
                "leave out hydra/sweeper to run all combinations."
            )
        # It imports torch while this process composes jobs and imports Optuna and MLflow.
        job_process.start_server(may_be_pt2e(master, [*params, *typed]))
        from qexp.launch.trials import SAMPLERS

        settings = settings_from(given, SAMPLERS)
        exclude_from_dirname(master)
        composer = Composer(master, loader)
        space = space_of(sweep_overrides(composer, params, typed))
        known = [planned(composer, space, combination) for combination in space.to_check()]
        if known[0].job.config.racing:
            raise ConfigError(
                "racing=true: a search learns from what it finds, and needs all images of each setting; leave racing "
                "out, or hydra/sweeper=qexp_optuna."
            )
        goal = goal_of(known[0].job.config)
        place = prepare(master, composer, known)
        place.study = runs_of_study(place.store, known[0].job.config, place.experiments)
        job_process.check_inputs_in_child([item.job.config for item in known])
        return search(place, space, goal, settings, known[0], launcher)


def search(
    place: Place, space: SearchSpace, goal: Goal, settings: Settings, first: Planned, launcher: Any
) -> Sequence[Any]:
    """Open the parent run, launch what Optuna proposes, batch by batch, and close the parent with the report."""
    from qexp.launch.trials import Trials

    config = first.job.config
    provenance = job_process.provenance_tags_in_child([config])[0]
    name = f"{config.study if config.study and config.resume else place.folder.name} "
    name += digest(space, goal, settings, provenance)
    trials = Trials(settings.storage, name, space, goal, settings.sampler, settings.seed)
    proposals = Proposals(place, space, trials, settings)
    earlier = proposals.earlier()
    if earlier:
        place.study = place.study.reusing(earlier)
    total = f"at most {settings.n_trials} jobs"
    reused = len(earlier)
    with opened(place, launcher, first.job, total) as sweep, progress.bar(max(settings.n_trials, reused), reused):
        sweep.planned += earlier
        while batch := proposals.batch():
            run_batch(sweep, batch, trials, goal)
    return sweep.returns


def run_batch(sweep: Sweep, batch: Sequence[tuple[Asked, Planned]], trials: Trials, goal: Goal) -> None:
    """Run the jobs of a batch that the study hasn't finished, and tell Optuna the results of all."""
    place, jobs = sweep.place, [item for _, item in batch]
    study = place.study.reusing(jobs)
    if len(study.finished) > len(place.study.finished):
        study.adopt(place.store, sweep.parent.id)
    place.study = study
    sweep.planned += jobs
    sweep.launch(place.claim(place.study.to_run(jobs)))
    ended = {row.name: row for row in sweep.rows() if row.status == "FINISHED"}
    for asked, item in batch:
        row = ended.get(item.name)
        trials.tell(asked, goal.outcome(row) if row else None)


@dataclass
class Proposals:
    """The jobs that Optuna proposes, none of them twice."""

    place: Place
    space: SearchSpace
    trials: Trials
    settings: Settings

    def __post_init__(self) -> None:
        self._done = self.trials.done()
        self._known = set(self._done)
        self._left = max(self.settings.n_trials - len(self._done), 0)
        # What another process may still be running is left to it.
        self._again = [] if self.place.study.shared else self.trials.left_over()

    def earlier(self) -> list[Planned]:
        """The jobs that have their results already, of a search that was stopped."""
        return [self._planned(values) for values in self._done.values()]

    def batch(self) -> list[tuple[Asked, Planned]]:
        """The next jobs, up to `n_jobs`; none where the search is over.

        After a stop it is first the rest of the batch that was stopped, so that the next one is chosen by the same
        results as if there had been none.
        """
        n_jobs = self.settings.n_jobs
        size = min(n_jobs - (self.settings.n_trials - self._left) % n_jobs, self._left)
        found: list[tuple[Asked, Planned]] = []
        for _ in range(PATIENCE):
            if len(found) == size:
                break
            asked = self._again.pop(0) if self._again else self.trials.ask()
            item = self._accepted(asked)
            if item is not None:
                found.append((asked, item))
        else:
            log.warning("the sampler proposes nothing new any more; the search ends %d trials early.", self._left)
        self._left = self._left - len(found) if found else 0
        return found

    def _accepted(self, asked: Asked) -> Planned | None:
        """The job of a trial, where it can run and is a new one."""
        try:
            item = self._planned(asked.values)
        except ConfigError as error:
            log.warning("not a job: %s", error)
            self.trials.refuse(asked, str(error))
            return None
        config_hash = identity.config_hash(item.job.config)
        if config_hash in self._known:
            self.trials.repeat(asked)
            return None
        self._known.add(config_hash)
        self.trials.begin(asked, config_hash)
        return item

    def _planned(self, values: Mapping[str, Any]) -> Planned:
        return planned(self.place.composer, self.space, self.space.combination(values))


def planned(composer: Composer, space: SearchSpace, combination: Sequence[str]) -> Planned:
    """The job that these overrides describe. Raises ConfigError where it can't run."""
    job = checked(composer, combination, [axis.key.lstrip("+~") for axis in space.axes.values()])
    name = space.name(credentials.masked_tree(list(combination)))
    return Planned([*combination, f"tracking.name={quoted(name)}"], job, name)


def digest(space: SearchSpace, goal: Goal, settings: Settings, provenance: Mapping[str, str]) -> str:
    """Eight hex digits that differ for searches whose trials can't be told from each other's results.

    provenance: the tags that the results depend on, of one of the jobs.
    """
    depends = {name: provenance[name] for name in DEPENDS_ON if name != "cpu" or goal.timed}
    axes = [asdict(axis) for axis in space.axes.values()]
    of = [axes, asdict(goal), depends, provenance["config_hash"], settings.sampler, settings.seed]
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:8]
