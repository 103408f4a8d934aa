"""The recommendation: which INT8 setting to ship, in which runtime, at an error rate that is known.

A candidate is a setting in a runtime; runtimes that agree bit for bit are one candidate, and so are the runs of a
setting that differ in the seed of calibration. A candidate qualifies by accuracy if it is shown, against all candidates
of the study (Holm), to lose less than the margin. Only that is a test at a known level: the speed is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qexp.config import schema
from qexp.records import Interval, RunRecord
from qexp.report.study import Latency, Study


@dataclass(frozen=True, eq=False)
class Candidate:
    """A setting in a runtime, that could be shipped.

    setting: the study's settings that varied, by name; runtimes: INT8 runtimes that agree bit for bit; runtime: of
    these, the one recommended, which is the fastest; records: finished runs, one a calibration seed, the one to ship
    first. images: of the test; delta: INT8 minus FP32 accuracy, mean over the seeds, with its 95% score interval, None
    where unknown; deltas: of each seed; p: one-sided, of a loss of the margin or more; 1 where it was not tested;
    adjusted: p after Holm over all candidates; qualifies: shown to lose less than the margin. latency: None where it
    was not timed; size_mb: None where that of this runtime isn't known. reasons: for which it can't be recommended
    whatever its accuracy, a clause each.
    """

    setting: Mapping[str, str]
    runtimes: tuple[str, ...]
    runtime: str
    records: tuple[RunRecord, ...]
    images: int
    delta: Interval | None
    deltas: tuple[float, ...]
    p: float
    adjusted: float
    qualifies: bool
    latency: Latency | None
    size_mb: float | None
    reasons: tuple[str, ...] = ()

    @property
    def ships(self) -> RunRecord:
        """The run to ship: that of the first calibration seed, so that none is chosen by its accuracy."""
        return self.records[0]

    @property
    def faster(self) -> bool:
        """True where the speedup's interval lies above 1 and can be trusted."""
        return self.latency is not None and self.latency.valid and self.latency.speedup.low > 1


class Answer(StrEnum):
    """The kinds of recommendation."""

    ship = "ship"
    stay_on_fp32 = "stay_on_fp32"
    cant_tell = "cant_tell"
    speed_unknown = "speed_unknown"


@dataclass(frozen=True, eq=False)
class Recommendation:
    """What to ship, and the evidence.

    kind: ship `chosen`; stay on FP32, since each candidate is shown to lose the margin or more, or isn't faster; can't
    tell with these images, `chosen` being the best candidate, provisional, None where there is none; or speed unknown,
    since no timing holds for the target. objective, margin, max_ms: what was asked. conditions: batch size and threads
    of the timings, None where nothing was timed. candidates: all of them, in the order in which their first runs
    started. qualified: those that qualify by accuracy, the fastest first. tied: those that the data can't tell from
    `chosen` by what was asked for, `chosen` among them; dropped: those tied that are shown less accurate than the best
    of the tied. chosen_by: images that the winner was chosen on, 0 where all candidates were tested. images: of the
    test; images_needed: so many would probably settle it, where it is open. reasons: for which it is so, in clauses;
    settles: what would settle an open question, in clauses; error_rate: what is controlled, in a sentence.
    """

    kind: Answer
    objective: schema.ReportObjective
    margin: float
    max_ms: float | None
    conditions: tuple[int, int] | None
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


def candidates(study: Study, question: schema.Report) -> list[Candidate]:
    """Every candidate of the study, tested against the margin and adjusted over all of them."""
    raise NotImplementedError


def recommend(study: Study, question: schema.Report) -> Recommendation:
    """The recommendation at the batch size and number of threads asked for, by default the first that were timed."""
    raise NotImplementedError


def recommendations(study: Study, question: schema.Report) -> list[Recommendation]:
    """A recommendation for each batch size and number of threads that was timed and asked for, the headline first."""
    raise NotImplementedError


def finalists(study: Study, question: schema.Report) -> list[str]:
    """Ids of the runs whose predicted classes (`Study.top1`) the recommendation needs beside metrics."""
    raise NotImplementedError


def front(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates than which none is both faster and more accurate, by their estimates, the fastest first; without
    those that have no accuracy, or no timing that can be trusted."""
    raise NotImplementedError
