"""The trials of a search in Optuna's storage: asked for, told their results, found again after a stop.

The only module that imports Optuna.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from qexp.errors import InputError
from qexp.launch.goal import Goal, Outcome
from qexp.launch.search_space import Axis, SearchSpace
from qexp.system import credentials

optuna.logging.set_verbosity(optuna.logging.WARNING)
log = logging.getLogger(__name__)

SAMPLERS = {"tpe": TPESampler, "nsgaii": NSGAIISampler, "random": RandomSampler}
# What a trial keeps: of the job that it stands for, and that it is equal to an earlier one.
HASH, REPEATS = "config_hash", "repeats"
# Proposals in a row that were equal to earlier trials, after which the next is drawn at random: of few values, TPE
# proposes the best ones again and again, whatever it is told.
STUCK = 10


@dataclass(frozen=True)
class Asked:
    """A trial that has no result yet. values: of each axis, by its key."""

    trial: Trial
    values: Mapping[str, Any]


class Trials:
    """The trials of one search in Optuna's storage, which is made where there is none.

    Raises InputError where it can't be used.
    """

    def __init__(self, storage: str, name: str, space: SearchSpace, goal: Goal, sampler: str, seed: int) -> None:
        self._sampler, self._seed = sampler, seed
        self._distributions = {axis.key: distribution(axis) for axis in space.axes.values()}
        try:
            self._study = optuna.create_study(
                storage=storage, study_name=name, direction=goal.direction, load_if_exists=True
            )
        except (SQLAlchemyError, ImportError, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"hydra.sweeper.storage={credentials.masked(storage)}: Optuna can't use it "
                f"({credentials.masked(reason)}); give a database's address, as in sqlite:///outputs/optuna.db."
            ) from error

    def done(self) -> dict[str, Mapping[str, Any]]:
        """The values of trials that have a result, by the config_hash of their jobs."""
        return {one.user_attrs[HASH]: one.params for one in self._all(TrialState.COMPLETE)}

    def left_over(self) -> list[Asked]:
        """The trials that were asked for and have no result, since what asked was stopped."""
        found = []
        for one in self._all(TrialState.RUNNING):
            if one.params.keys() == self._distributions.keys():
                found.append(Asked(Trial(self._study, one._trial_id), one.params))
            else:  # it was stopped while it was being asked for
                self._study.tell(one.number, state=TrialState.FAIL)
        return found

    def ask(self) -> Asked:
        """A new trial. It depends on the seed, on the number of trials so far, and on their results, and on nothing
        else, so that a search that was stopped goes on as if it had not been."""
        known = self._all()
        seed = int(np.random.SeedSequence((self._seed, len(known))).generate_state(1)[0])
        is_stuck = len(known) >= STUCK and all(REPEATS in one.user_attrs for one in known[-STUCK:])
        self._study.sampler = made_sampler("random" if is_stuck else self._sampler, seed)
        trial = self._study.ask(self._distributions)
        return Asked(trial, trial.params)

    def begin(self, asked: Asked, config_hash: str) -> None:
        """Note the job that a trial stands for."""
        asked.trial.set_user_attr(HASH, config_hash)

    def tell(self, asked: Asked, outcome: Outcome | None) -> None:
        """Give a trial its result. outcome: None where its job has none."""
        if outcome is None:
            self._study.tell(asked.trial, state=TrialState.FAIL)
            return
        if outcome.excess is not None:
            asked.trial.set_constraint("bound", outcome.excess)
        self._study.tell(asked.trial, outcome.value)

    def repeat(self, asked: Asked) -> None:
        """Drop a trial that another one is equal to."""
        asked.trial.set_user_attr(REPEATS, True)
        self._study.tell(asked.trial, state=TrialState.FAIL)

    def refuse(self, asked: Asked, reason: str) -> None:
        """Tell the sampler to keep away from values that don't go together."""
        asked.trial.set_user_attr("refused", reason)
        self._study.tell(asked.trial, state=TrialState.PRUNED)

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)


def made_sampler(name: str, seed: int) -> BaseSampler:
    """A sampler of Optuna's by its name in SAMPLERS."""
    made: BaseSampler = SAMPLERS[name](seed=seed)
    return made


def distribution(axis: Axis) -> BaseDistribution:
    """The distribution of Optuna's that has an axis's values."""
    if axis.low is None or axis.high is None:
        return CategoricalDistribution(axis.values)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, axis.log, int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, axis.log, axis.step)
