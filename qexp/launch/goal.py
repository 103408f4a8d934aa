"""The goal of a search: that of the report that it ends with, as a value to optimise and a bound to keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qexp.config.schema import Config, Report, ReportObjective
from qexp.errors import ConfigError
from qexp.records import RunRecord
from qexp.report.candidates import Candidate, candidates, margin_of, parted
from qexp.report.study import Study, studies


@dataclass(frozen=True)
class Outcome:
    """A run's value, and by how much it goes beyond the bound: 0 or less where it keeps it; None where there is none.

    The value is a latency in ms or a size in MB, to be small, or an accuracy's difference to FP32's, to be large; the
    excess is a loss of accuracy beyond the margin, as a fraction of 1, or a time in ms.
    """

    value: float
    excess: float | None


@dataclass(frozen=True)
class Goal:
    """The best of the settings, as `report.objective` means it. timed: True where latency is measured.

    Fastest or smallest: within the bound are runs that are shown to lose less accuracy than the margin, by the lower
    end of the 95% interval. Accurate: those that take no more than `report.max_ms`. Where the fastest is asked for and
    nothing is timed, the most accurate is searched for.
    """

    question: Report
    timed: bool

    @property
    def objective(self) -> ReportObjective:
        fastest = self.question.objective is ReportObjective.fastest
        return ReportObjective.accurate if fastest and not self.timed else self.question.objective

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "maximize" if self.objective is ReportObjective.accurate else "minimize"

    def outcome(self, record: RunRecord) -> Outcome | None:
        """A finished run's outcome, that of the best of its runtimes; None where what is asked for isn't known."""
        found = [outcome for study in studies([record]) for outcome in self._outcomes(study)]
        sign = -1 if self.direction == "maximize" else 1
        return min(found, key=lambda one: (max(one.excess or 0.0, 0.0), sign * one.value), default=None)

    def _outcomes(self, study: Study) -> Iterator[Outcome]:
        margin = margin_of(study, self.question)
        for one in candidates(study, self.question):
            if one.delta is None or parted(one.hypothesis):
                continue
            value, excess = self._value(one), self._excess(one, margin)
            if value is not None and math.isfinite(value):
                yield Outcome(value, excess)

    def _value(self, one: Candidate) -> float | None:
        match self.objective:
            case ReportObjective.fastest:
                return one.latency.ms if one.latency else None
            case ReportObjective.smallest:
                return one.size_mb
            case ReportObjective.accurate:
                return one.delta.value if one.delta else None
        raise AssertionError(self.objective)

    def _excess(self, one: Candidate, margin: float) -> float | None:
        if self.objective is not ReportObjective.accurate:
            return -margin - one.delta.low if one.delta else math.inf
        if self.question.max_ms is None:
            return None
        return one.latency.ms - self.question.max_ms if one.latency else math.inf


def goal_of(config: Config) -> Goal:
    """The goal of a search whose jobs have this configuration. Raises ConfigError where its runs wouldn't tell."""
    goal = Goal(config.report, config.latency.enabled)
    if config.report.objective is ReportObjective.accurate and not goal.timed:
        raise ConfigError(
            f"report.objective=accurate: searches for the most accurate within report.max_ms={config.report.max_ms:g}, "
            "and latency=off measures no latency; use report.objective=fastest, which then searches for the most "
            "accurate, or latency=quick."
        )
    return goal
