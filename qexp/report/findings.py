"""Everything that a report says of a study, as values: fetched from the store and computed here, worded elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qexp.config import schema
from qexp.records import RunRecord, Top1
from qexp.report import calibration, classes, decision, effects, layers
from qexp.report.calibration import CalibrationSamples, CalibrationSizes, Winners
from qexp.report.classes import ClassChange
from qexp.report.decision import Candidate, Recommendation
from qexp.report.effects import Interaction, MainEffects
from qexp.report.layers import LayerComparison
from qexp.report.study import Study, studies, value

if TYPE_CHECKING:
    from qexp.tracking.store import Store

# Predicted classes are fetched of all runs of a study up to so many, and beyond that of the finalists only.
MOST_PREDICTIONS = 1000


@dataclass(frozen=True, eq=False)
class Findings:
    """All results of a study. headline: the first recommendation; others: at other batch sizes or numbers of threads.

    front: the candidates of the Pareto front; chosen: the candidate whose layers and classes are shown, the recommended
    one or else the best, None without any; worst: the one that loses most accuracy; layers, classes: empty or None
    where the runs have no such files; timing: the content of the chosen run's `latency.json`.
    """

    study: Study
    headline: Recommendation
    others: tuple[Recommendation, ...]
    front: tuple[Candidate, ...]
    effects: MainEffects
    interactions: tuple[Interaction, ...]
    samples: tuple[CalibrationSamples, ...]
    sizes: tuple[CalibrationSizes, ...]
    winners: Winners | None
    chosen: Candidate | None
    worst: Candidate | None
    layers: LayerComparison | None
    classes: tuple[ClassChange, ...]
    timing: Mapping[str, Any]


@dataclass(frozen=True)
class Files:
    """The artifacts of runs in a store; without a store there are none."""

    store: Store | None

    def of(self, records: Sequence[RunRecord], name: str) -> dict[str, bytes]:
        from qexp import tracking

        return tracking.artifacts(self.store, records, name) if self.store and records else {}

    def top1(self, records: Sequence[RunRecord]) -> dict[str, Top1]:
        from qexp import tracking

        return tracking.top1(self.store, records) if self.store and records else {}


def find(store: Store | None, records: Sequence[RunRecord], question: schema.Report) -> list[Findings]:
    """The findings of each study among the runs. store: where their files are; None: nothing but records is used."""
    files = Files(store)
    several = files.of([one for one in records if _has_several_timings(one)], "latency.json")
    timings = {run_id: json.loads(content) for run_id, content in several.items()}
    wanted = [record for study in studies(records, None, timings) for record in _predicted(study, question)]
    return [of_study(study, question, files) for study in studies(records, files.top1(wanted), timings)]


def _has_several_timings(record: RunRecord) -> bool:
    return any("," in value(record, name) for name in ("latency.batch_sizes", "latency.threads"))


def _predicted(study: Study, question: schema.Report) -> list[RunRecord]:
    """The runs whose predicted classes are fetched."""
    if len(study.finished) <= MOST_PREDICTIONS:
        return list(study.finished)
    finalists = set(decision.finalists(study, question))
    return [record for record in study.finished if record.run_id in finalists]


def of_study(study: Study, question: schema.Report, files: Files) -> Findings:
    """The findings of one study. files: those of its runs."""
    headline, *others = decision.recommendations(study, question)
    known = [one for one in headline.candidates if one.delta is not None]
    worst = min(known, key=lambda one: one.delta.value if one.delta else 0.0, default=None)
    chosen = headline.chosen or max(known, key=lambda one: one.delta.value if one.delta else 0.0, default=None)
    return Findings(
        study,
        headline,
        tuple(others),
        tuple(decision.front(headline.candidates)),
        effects.main_effects(study, question.runtime, headline.conditions),
        tuple(effects.interactions(study, question.runtime, headline.conditions)),
        tuple(calibration.samples(study.records)),
        tuple(calibration.sizes(study.records)),
        calibration.winners(study),
        chosen,
        worst,
        _layers(files, chosen, worst),
        _classes(study, chosen),
        _timing(files, chosen),
    )


def _layers(files: Files, chosen: Candidate | None, worst: Candidate | None) -> layers.LayerComparison | None:
    if chosen is None or worst is None:
        return None
    ids = chosen.ships.run_id, worst.ships.run_id
    tables = files.of([chosen.ships, worst.ships], "layers.csv")
    return layers.compare(tables[ids[0]], tables[ids[1]]) if tables.keys() >= set(ids) else None


def _classes(study: Study, chosen: Candidate | None) -> tuple[classes.ClassChange, ...]:
    top1 = study.top1.get(chosen.ships.run_id) if chosen else None
    return tuple(classes.changes(top1, chosen.runtime)) if chosen and top1 else ()


def _timing(files: Files, chosen: Candidate | None) -> Mapping[str, Any]:
    content = files.of([chosen.ships], "latency.json").get(chosen.ships.run_id) if chosen and chosen.latency else None
    document: Mapping[str, Any] = json.loads(content) if content else {}
    return document
