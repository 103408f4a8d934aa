"""The settings that a search varies, each with the values that it can have, read from a sweep's overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from qexp.config.composition import each
from qexp.errors import ConfigError
from qexp.launch.planning import plain, short

DIGITS = 6  # significant ones of a value within an interval


@dataclass(frozen=True)
class Axis:
    """A setting that varies.

    overrides: one for each value that is listed, empty for an interval; low, high: the ends of a range or interval,
    both of them among its values, None where the values have no order; step: of a range; log: True for an interval
    that is gone through by its logarithm.
    """

    key: str
    overrides: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False

    def override(self, value: Any) -> str:
        """The override for a value: one of `values`, a number of a range, or a number between an interval's ends."""
        if not self.overrides:
            rounded = value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
            return f"{self.key}={rounded!r}"
        if self.low is None or self.step is None:
            return f"{self.key}={value}"
        return self.overrides[round((value - self.low) / self.step)]

    @property
    def values(self) -> tuple[str, ...]:
        """The values that are listed, as text."""
        return tuple(override.partition("=")[2] for override in self.overrides)

    @property
    def to_check(self) -> tuple[str, ...]:
        """The overrides of all values, or of an interval's ends."""
        return self.overrides or (self.override(self.low), self.override(self.high))

    def label(self, override: str) -> str:
        """The part of a job's name that an override of this setting is: a short one, where no two values share it."""
        return short(override) if len(set(map(short, self.overrides))) == len(self.overrides) else override


@dataclass(frozen=True)
class SearchSpace:
    """The axes of a search, and the place of each among the overrides; the others are the same in all jobs."""

    axes: Mapping[int, Axis]
    overrides: tuple[str, ...]

    def combination(self, chosen: Mapping[str, Any]) -> list[str]:
        """The overrides of a job. chosen: the value of each axis, by its key, as `Axis.override` takes it."""
        return self._with({place: axis.override(chosen[axis.key]) for place, axis in self.axes.items()})

    def to_check(self) -> list[list[str]]:
        """Combinations in which each value stands once, those of the other axes being their first."""
        first = {place: axis.to_check[0] for place, axis in self.axes.items()}
        others = [{**first, place: value} for place, axis in self.axes.items() for value in axis.to_check[1:]]
        return [self._with(one) for one in (first, *others)]

    def name(self, combination: Sequence[str]) -> str:
        """The name of a job; those of two jobs differ."""
        return plain(" ".join(axis.label(combination[place]) for place, axis in self.axes.items()))

    def _with(self, chosen: Mapping[int, str]) -> list[str]:
        return [chosen.get(place, override) for place, override in enumerate(self.overrides)]


def space_of(overrides: Sequence[Override]) -> SearchSpace:
    """The search space of a sweep's overrides. Raises ConfigError where none is swept over, or a setting twice."""
    axes: dict[int, Axis] = {}
    for place, override in enumerate(overrides):
        if override.is_sweep_override():
            axis = axis_of(override)
            if any(axis.key == other.key for other in axes.values()):
                raise ConfigError(f"{override.input_line}: {axis.key} is searched over twice; list its values once.")
            axes[place] = axis
    if not axes:
        raise ConfigError(
            "hydra/sweeper=qexp_optuna: no setting has several values to search over; list some, as in "
            "observer=minmax,mse or qconfig.weight.bits=range(4,9) or observer.percentile=interval(99,100)."
        )
    return SearchSpace(axes, tuple(str(override.input_line) for override in overrides))


def axis_of(override: Override) -> Axis:
    """The axis that a sweep override describes: a choice, a range or an interval."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        log = "log" in value.tags
        if low is None or high is None or not low < high or (log and low <= 0):
            rule = "two numbers above 0" if log else "two numbers"
            raise ConfigError(f"{override.input_line}: an interval goes from the lower to the higher of {rule}.")
        return Axis(key, (), low, high, None, log)
    listed = tuple(dict.fromkeys(each(override)))
    if isinstance(value, RangeSweep) and not value.shuffle and value.start is not None and len(listed) > 1:
        step = value.step
        if step < 0:
            listed, step = listed[::-1], -step
        low = value.start if value.step > 0 else value.start + value.step * (len(listed) - 1)
        return Axis(key, listed, low, low + step * (len(listed) - 1), step)
    return Axis(key, listed)
