"""The recommendation: which INT8 setting to ship, in which runtime, at an error rate that is known.

A candidate is a setting in a runtime; runtimes that agree bit for bit are one candidate, and so are the runs of a
setting that differ in the seed of calibration. A candidate qualifies by accuracy if it is shown, against all candidates
of the study (Holm), to lose less than the margin. Only that is a test at a known level: the speed is an estimate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from scipy import stats

from qexp import statistics
from qexp.config import composition, schema
from qexp.config.identity import NOT_APPLICABLE
from qexp.config.schema import ReportObjective
from qexp.metrics import Metric
from qexp.records import AccuracySource
from qexp.report.candidates import (
    LEVEL,
    Candidate,
    candidates,
    conditions,
    counts_of,
    finite,
    images_of,
    margin_of,
    parted,
    parts,
    scale_of,
    select_share,
    simulated,
    sums_of,
)
from qexp.report.study import Conditions, Study

__all__ = [
    "Answer", "Candidate", "Recommendation", "as_fast", "candidates", "finalists", "front", "points", "recommend",
    "recommendations",
]  # fmt: skip

# Sizes that differ by less are tied.
SIZE_TIE = 0.01


class Answer(StrEnum):
    """The kinds of recommendation."""

    ship = "ship"
    stay_on_fp32 = "stay_on_fp32"
    cant_tell = "cant_tell"
    speed_unknown = "speed_unknown"


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The answer of a study, and the evidence for it.

    kind: ship `chosen`; stay on FP32, since each candidate is shown to lose the margin or more, or isn't faster; can't
    tell with these images, `chosen` being the best candidate, provisional, None where there is none; or speed unknown,
    since no timing holds for the target. objective, margin, max_ms: what was asked. conditions: batch size and threads
    of the timings, None where nothing was timed. candidates: all of them, in the order in which their first runs
    started. qualified: those that qualify by accuracy, the fastest first. tied: those that the data can't tell from
    the best by what was asked for, `chosen` among them, and `dropped`, those of them that are shown less accurate than
    the most accurate. chosen_by: images that the winner was chosen on, 0 where all candidates were tested. images: of
    the test; images_needed: so many would probably settle it, where it is open. reasons: for which it is so, in
    clauses; settles: what would settle an open question, in clauses; error_rate: what is controlled, in a sentence.
    """

    kind: Answer
    objective: ReportObjective
    margin: float
    max_ms: float | None
    conditions: Conditions | None
    candidates: tuple[Candidate, ...]
    qualified: tuple[Candidate, ...]
    chosen: Candidate | None
    tied: tuple[Candidate, ...]
    dropped: tuple[Candidate, ...]
    chosen_by: int
    images: int
    images_needed: int | None
    reasons: tuple[str, ...]
    settles: tuple[str, ...]
    error_rate: str


# ---- The recommendation


def recommendations(study: Study, question: schema.Report) -> list[Recommendation]:
    """A recommendation for each batch size and number of threads that was timed and asked for, the headline first."""
    asked = conditions(study, question)
    if not asked:
        return [recommend(study, question)]
    return [recommend(study, replace(question, batch_size=size, threads=threads)) for size, threads in asked]


def recommend(study: Study, question: schema.Report) -> Recommendation:
    """The recommendation at the batch size and number of threads asked for, by default the first that were timed."""
    found, margin, share = candidates(study, question), margin_of(study, question), select_share(study)
    case = _Case(study, question, margin, share, tuple(found))
    if question.objective is ReportObjective.accurate:
        return _most_accurate(case)
    # Not `possible`: the images of the test must not choose what is tested.
    usable = [one for one in case.found if not one.reasons and not case.fails(one)]
    if share and usable:
        return _tested_once(case, usable)
    if share:
        # Nothing can be shipped, so there is no winner to test alone.
        case = replace(case, found=_adjusted(case.found))
    good = [one for one in case.possible if one.qualifies and not one.reasons]
    return _ship(case, good) if good else _nothing_to_ship(case)


@dataclass(frozen=True, eq=False)
class _Case:
    """A question about a study, and its candidates."""

    study: Study
    question: schema.Report
    margin: float
    share: float
    found: tuple[Candidate, ...]

    @property
    def possible(self) -> list[Candidate]:
        """The candidates that are neither shown to lose the margin or more nor known not to be what is asked for."""
        left = [one for one in self.found if not self.loses(one) and not self.fails(one)]
        return [one for one in left if not parted(one.hypothesis) and not simulated(one.hypothesis)]

    @property
    def open(self) -> bool:
        """True where a candidate could be recommended, if only it were accurate."""
        return any(not one.reasons for one in self.found)

    def loses(self, one: Candidate) -> bool:
        """True where it is shown to lose the margin or more, be it on the images that it saw before racing stopped
        it."""
        known = one.delta or one.partial
        return known is not None and known.high < -self.margin

    def fails(self, one: Candidate) -> bool:
        """True where it isn't faster (or smaller) than FP32, as far as can be told, or slower than allowed."""
        match self.question.objective:
            case ReportObjective.smallest:
                fp32 = finite(one.ships, Metric.size_fp32)
                return one.size_mb is not None and fp32 is not None and one.size_mb >= fp32
            case ReportObjective.fastest:
                return one.latency is not None and one.latency.valid and not one.faster
            case ReportObjective.accurate:
                return one.latency is not None and one.latency.valid and not one.latency.ms <= self.limit
        raise AssertionError(self.question.objective)

    @property
    def limit(self) -> float:
        return math.inf if self.question.max_ms is None else self.question.max_ms

    def worth(self, one: Candidate) -> float:
        """The speedup, or the size with a minus; -inf where unknown."""
        if self.question.objective is ReportObjective.smallest:
            return -math.inf if one.size_mb is None else -one.size_mb
        return _speed(one)

    def ties(self, one: Candidate, other: Candidate) -> bool:
        if self.question.objective is ReportObjective.smallest:
            return abs(math.log(self.worth(one) / self.worth(other))) < SIZE_TIE
        return as_fast(one, other)


def _speed(one: Candidate) -> float:
    return one.latency.speedup.value if one.latency and one.latency.valid else -math.inf


def as_fast(one: Candidate, other: Candidate) -> bool:
    """True where the data can't tell which is faster: they share a timing, or their log speedups differ by less than
    the root of the sum of the squared half-widths of their intervals."""
    a, b = one.latency, other.latency
    if a is None or b is None:
        return False
    if one is other or a.measurement == b.measurement:
        return True
    apart = abs(math.log(a.speedup.value / b.speedup.value))
    return apart < math.hypot(a.log_half_width, b.log_half_width)


def _ship(case: _Case, good: Sequence[Candidate]) -> Recommendation:
    best = max(good, key=case.worth)
    tied = [one for one in good if one is best or case.ties(one, best)]
    kept, dropped = _narrowed(case, tied)
    return _answer(case, Answer.ship, _simplest(case, kept), tied=tied, dropped=dropped)


def _tested_once(case: _Case, usable: Sequence[Candidate]) -> Recommendation:
    """The winner on the images set aside, tested on the rest: of those that would, by their estimates, probably qualify
    there, or without any of those whose estimate is within the margin."""
    within = [one for one in usable if one.selection is not None and one.selection > -case.margin]
    within = [one for one in within if _would_qualify(case, one)] or within
    if not within:
        return _nothing_to_ship(case)
    best = max(within, key=case.worth)
    tied = [one for one in within if one is best or case.ties(one, best)]
    kept, dropped = _narrowed(case, tied)
    chosen = _simplest(case, kept)
    winner = replace(chosen, adjusted=chosen.p, qualifies=chosen.p <= LEVEL)

    def with_winner(some: Iterable[Candidate]) -> tuple[Candidate, ...]:
        return tuple(winner if one is chosen else one for one in some)

    case, tied = replace(case, found=with_winner(case.found)), [*with_winner(tied)]
    if winner.qualifies:
        return _answer(case, Answer.ship, winner, tied=tied, dropped=dropped)
    needed = _needed(case, winner, LEVEL)
    # So many for the test alone.
    needed = None if needed is None else statistics.round_up(needed / (1 - case.share))
    return _answer(case, Answer.cant_tell, winner, tied=tied, dropped=dropped, needed=needed)


def _would_qualify(case: _Case, one: Candidate) -> bool:
    """True if the number of images of the test would do, were they like those set aside."""
    sums, seeds = sums_of(case.study, one.hypothesis), len(one.records)
    if sums is None:
        return False
    first, rest = parts(len(sums), case.share)
    counts = np.bincount(sums[first] + seeds, minlength=2 * seeds + 1)
    needed = statistics.images_to_qualify(scale_of(seeds), counts, case.margin, LEVEL)
    return needed is not None and needed <= len(rest)


def _adjusted(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    adjusted = statistics.holm([one.p for one in found]).tolist()
    return tuple(replace(one, adjusted=p, qualifies=p <= LEVEL) for one, p in zip(found, adjusted, strict=True))


def _most_accurate(case: _Case) -> Recommendation:
    timed = [one for one in case.found if one.latency and one.latency.valid and not one.reasons and one.delta]
    if timed and min(one.latency.fp32_ms for one in timed if one.latency) <= case.limit:
        return _answer(case, Answer.stay_on_fp32)
    within = [one for one in timed if not case.fails(one)]
    if not within:
        return _answer(case, Answer.stay_on_fp32) if timed else _nothing_to_ship(case)
    kept, dropped = _narrowed(case, within)
    best = max(kept, key=_speed)
    chosen = _simplest(case, [one for one in kept if as_fast(one, best)])
    return _answer(case, Answer.ship, chosen, tied=within, dropped=dropped)


def _nothing_to_ship(case: _Case) -> Recommendation:
    if case.found and not case.possible:
        return _answer(case, Answer.stay_on_fp32)
    qualified = [one for one in case.possible if one.qualifies]
    timed = any(one.latency and one.latency.valid for one in case.found)
    if qualified and not timed and case.question.objective is not ReportObjective.smallest:
        return _answer(case, Answer.speed_unknown, _simplest(case, qualified), tied=qualified)
    whole = [one for one in case.possible if not one.raced_out]
    pool = [one for one in whole if one.delta and not one.qualifies] or whole
    chosen = _provisional(case, pool)
    rejected = sum(one.qualifies for one in case.found)
    level = LEVEL if case.share else LEVEL / max(len(case.found) - rejected, 1)
    needed = _needed(case, chosen, level) if chosen and not chosen.qualifies else None
    return _answer(case, Answer.cant_tell, chosen, needed=needed)


def _provisional(case: _Case, pool: Sequence[Candidate]) -> Candidate | None:
    """The best candidate by its estimates: of those tied with the best whose mean lies within the margin the one of the
    smallest p-value; without any within, the one of the smallest of all."""
    within = [one for one in pool if one.delta and one.delta.value > -case.margin]
    if best := max(within, key=case.worth, default=None):
        pool = [one for one in within if one is best or case.worth(best) == -math.inf or case.ties(one, best)]
    return min(pool, key=lambda one: one.p, default=None)


def _needed(case: _Case, one: Candidate, level: float) -> int | None:
    """The number of images that would probably show that it loses less than the margin; where it seems to lose more,
    that it does. None where neither can be said."""
    counts = counts_of(case.study, one.hypothesis, case.share)
    if counts is None:
        return None
    scale = scale_of(len(one.records))
    needed = statistics.images_to_qualify(scale, counts, case.margin, level)
    if needed is None:
        needed = statistics.images_to_qualify(scale, counts[::-1], -case.margin, LEVEL)
    return None if needed is None else max(needed, int(counts.sum()) + 1)


# ---- Of the tied


def _narrowed(case: _Case, tied: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Divide the tied: those not shown less accurate than the most accurate of them, and those shown.

    Paired by image, over all seeds, at the one level and adjusted over the tied (Holm); on the images set aside, where
    there are some. Those whose predicted classes are not at hand stay.
    """
    known = [(one, means) for one in tied if (means := _means(case, one)) is not None]
    if len(known) < 2:
        return list(tied), []
    best, of_best = max(known, key=lambda pair: float(pair[1].mean()))
    others = [(one, means) for one, means in known if one is not best and len(means) == len(of_best)]
    p = [_less_accurate(means - of_best) for _, means in others]
    worse = {id(one) for (one, _), adjusted in zip(others, statistics.holm(p), strict=True) if adjusted <= LEVEL}
    return [one for one in tied if id(one) not in worse], [one for one in tied if id(one) in worse]


def _means(case: _Case, one: Candidate) -> np.ndarray | None:
    """float64 [images]: of each image to choose by, the mean difference to FP32 over the seeds."""
    sums = sums_of(case.study, one.hypothesis)
    if sums is None:
        return None
    chosen = parts(len(sums), case.share)[0] if case.share else slice(None)
    return np.asarray(sums[chosen] / len(one.records))


def _less_accurate(differences: np.ndarray) -> float:
    """One-sided p-value of a mean difference per image of 0 or more; small where it is shown to be less."""
    values, counts = np.unique(np.round(differences, 9), return_counts=True)
    return float(stats.norm.cdf(statistics.mean_score_z(values, counts, 0.0)))


def _simplest(case: _Case, tied: Sequence[Candidate]) -> Candidate:
    """The one with the fewest 7-bit layers; of equal ones the fewest calibration images; then the most defaults."""
    usual = composition.defaults()

    def complexity(one: Candidate) -> tuple[float, float, int, float]:
        unusual = sum(usual.get(name, text) not in (text, NOT_APPLICABLE) for name, text in one.setting.items())
        images = one.ships.metrics.get(Metric.calibration_images, math.inf)
        return one.seven_bit_layers, images, unusual, -case.worth(one)

    return min(tied, key=complexity)


def front(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates than which none is both faster and more accurate, by their estimates, the fastest first; without
    those that have no accuracy, or no timing that can be trusted."""
    known = [one for one in found if one.delta is not None and _speed(one) > -math.inf]
    result: list[Candidate] = []
    highest = -math.inf
    for one in sorted(known, key=lambda one: (-_speed(one), -one.delta.value if one.delta else 0.0)):
        if one.delta and one.delta.value > highest:
            result.append(one)
            highest = one.delta.value
    return result


def finalists(study: Study, question: schema.Report) -> list[str]:
    """Ids of the runs whose predicted classes (`Study.top1`) the recommendation needs beside metrics.

    Of a candidate with several calibration seeds all runs, unless it is clear without that it loses the margin; of the
    others those that are tied, to compare them with each other. With images set aside for choosing, all runs.
    """
    if select_share(study):
        return [record.run_id for record in study.finished]
    margin, found = margin_of(study, question), recommendations(study, question)
    several = [one for one in found[0].candidates if len(one.records) > 1 and one.delta and one.delta.high >= -margin]
    chosen = [*several, *(one for each in found for one in (*each.tied, *filter(None, [each.chosen])))]
    return list(dict.fromkeys(record.run_id for one in chosen for record in one.records))


# ---- In words


def _answer(
    case: _Case,
    kind: Answer,
    chosen: Candidate | None = None,
    *,
    tied: Sequence[Candidate] = (),
    dropped: Sequence[Candidate] = (),
    needed: int | None = None,
) -> Recommendation:
    images = chosen.images if chosen else max((one.images for one in case.found), default=0)
    total = max((images_of(one.hypothesis) for one in case.found), default=0)
    return Recommendation(
        kind=kind,
        objective=case.question.objective,
        margin=case.margin,
        max_ms=case.question.max_ms,
        conditions=next(iter(conditions(case.study, case.question)), None),
        candidates=case.found,
        qualified=tuple(sorted((one for one in case.found if one.qualifies), key=case.worth, reverse=True)),
        chosen=chosen,
        tied=tuple(tied),
        dropped=tuple(dropped),
        chosen_by=total - images if case.share else 0,
        images=images,
        images_needed=needed,
        reasons=tuple(_reasons(case, kind, images)),
        settles=tuple(_settles(case, kind, chosen, total if case.share else images, needed)),
        error_rate=_error_rate(case, images, total),
    )


def _reasons(case: _Case, kind: Answer, images: int) -> Iterator[str]:
    """The reasons for an answer that is no setting, and those for which candidates can't be recommended."""
    number, objective = len(case.found), case.question.objective
    if not case.found:
        nowhere = f"no run has report.runtime={case.question.runtime}"
        yield nowhere if case.study.finished and case.question.runtime else "no run has finished"
    if kind is Answer.stay_on_fp32 and objective is ReportObjective.accurate:
        yield _too_slow(case)
    elif kind is Answer.stay_on_fp32:
        losing = sum(case.loses(one) for one in case.found)
        others = sum(case.fails(one) and not case.loses(one) for one in case.found)
        if losing:
            yield f"{_some(losing, number)} {_are(losing)} shown to lose {points(case.margin)} or more"
        if others:
            what = "smaller" if objective is ReportObjective.smallest else "faster"
            yield f"{_some(others, number)} {_are(others)} not shown to be {what} than FP32"
    elif kind is Answer.cant_tell and case.open and not any(one.qualifies for one in case.found):
        yield _not_shown(case, images)
    yield from _ruled_out([one.reasons[0] for one in case.found if one.reasons], number)


def _ruled_out(reasons: Sequence[str], number: int) -> Iterator[str]:
    """The most frequent first; of those that differ only in what comes after a colon, one as an example."""
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(reason.partition(": ")[0], []).append(reason)
    for alike in sorted(kinds.values(), key=len, reverse=True):
        (most, _), *others = Counter(alike).most_common()
        yield f"{_some(len(alike), number)} can't be recommended: {most}{', for example' * bool(others)}"


def _some(count: int, number: int) -> str:
    """`31 of 48 candidates`."""
    if number == 1:
        return "the one candidate"
    if count == number:
        return "both candidates" if number == 2 else f"all {number} candidates"
    return f"{count} of {number} candidates"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _too_slow(case: _Case) -> str:
    known = [one.latency for one in case.found if one.latency and one.latency.valid]
    fp32, int8 = min(one.fp32_ms for one in known), min(one.ms for one in known)
    if fp32 <= case.limit:
        return f"FP32 itself takes {Metric.latency_fp32.text(fp32)} ms, and {case.limit:g} ms are allowed"
    return f"the fastest candidate takes {Metric.latency_int8.text(int8)} ms, and {case.limit:g} ms are allowed"


def _not_shown(case: _Case, images: int) -> str:
    margin, number = points(case.margin), len(case.found)
    if case.share:
        return f"the candidate chosen on the images set aside is not shown, on the others, to lose less than {margin}"
    if images and _hopeless(images, case.margin, number):
        any_of = "the one candidate" if number == 1 else f"any of {number} candidates"
        return (
            f"{images:,} images can't show for {any_of} that it loses less than {margin}, even if not a single image "
            "were answered otherwise"
        )
    none = "the one candidate is not" if number == 1 else f"none of {number} candidates is"
    return f"{none} shown to lose less than {margin}"


def _hopeless(images: int, margin: float, number: int) -> bool:
    return float(stats.norm.sf(statistics.tango_z(-margin, 0, 0, images))) > LEVEL / number


def _settles(case: _Case, kind: Answer, chosen: Candidate | None, images: int, needed: int | None) -> Iterator[str]:
    if needed is not None:
        source = chosen.ships.tags.get("accuracy_source") if chosen and chosen.hypothesis.on_target else None
        setting = {AccuracySource.emulated: "emulated_images", AccuracySource.exact: "exact_images"}
        how = f" (saturation.{setting[AccuracySource(source)]})" if source else ""
        yield f"about {needed:,} test images in place of {images:,}{how}"
    if kind is Answer.ship or kind is Answer.stay_on_fp32:
        return
    timed = [one.latency for one in case.possible if one.latency and not one.latency.valid]
    if case.question.objective is ReportObjective.smallest:
        return
    if any("target=" in reason for latency in timed for reason in latency.reasons):
        yield "timings on the CPU that ships"
    elif timed:
        yield "timings on a quiet machine"
    elif case.possible and not any(one.latency for one in case.possible):
        yield "timings as asked for" if case.study.conditions else "timings"


def _error_rate(case: _Case, images: int, total: int) -> str:
    number, level = len(case.found), f"{100 * LEVEL:g}%"
    seeds = max((len(one.records) for one in case.found), default=1)
    mean = f", as a mean over its {seeds} calibration seeds," if seeds > 1 else ""
    if case.question.objective is ReportObjective.accurate:
        return (
            f"A candidate that is as accurate as the best is left out as less accurate in at most {level} of studies "
            "(paired by image, Holm); nothing is promised about the margin or the speed."
        )
    if case.share:
        how = f"chosen on {total - images:,} images and tested once, on the other {images:,}"
    else:
        how = f"Holm over {number} candidates, score test" if number > 1 else "score test"
    what = "size" if case.question.objective is ReportObjective.smallest else "speed"
    return (
        f"A setting that loses {points(case.margin)} or more{mean} is recommended in at most {level} of studies "
        f"({how}); this is about accuracy, and the {what} is an estimate."
    )


def points(fraction: float) -> str:
    """A fraction of accuracy as `0.5 points`."""
    return f"{100 * fraction:g} points"
