"""Racing on simulated studies: how often it drops the setting that all images recommend, and what it saves.

make bench BENCH=racing
QEXP_BENCH_RUNS=outputs make bench BENCH=racing     # on the studies of runs that were made, too
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks import decision
from benchmarks.decision import MARGIN, QUESTION, SETTINGS, STUDIES, Law
from benchmarks.size import sized
from qexp import statistics, tracking
from qexp.config.schema import Connection
from qexp.report import racing
from qexp.report.candidates import candidates, conditions, margin_of
from qexp.report.decision import Answer, recommend
from qexp.report.racing import Evaluated, Reason
from qexp.report.study import Study, studies

# The number of images, the median of the settings' true losses, and whether some images are more difficult.
MIXES = sized(
    (
        (744, 0.004, False), (2000, 0.004, False), (10_000, 0.004, False), (2000, 0.004, True),
        (2000, 0.0015, False), (10_000, 0.0015, False), (10_000, 0.015, False),
    ),
    ((744, 0.004, False),),
)  # fmt: skip
# The outputs of runs to race again, if this environment variable names them.
RUNS = "QEXP_BENCH_RUNS"


@dataclass(frozen=True)
class Raced:
    """A race in one study. recommended: by all images, something; dropped: that is a setting that was stopped; share:
    of all evaluations of images, those that were made; stopped: the number of settings, by the reason."""

    recommended: bool
    dropped: bool
    share: float
    stopped: Counter[Reason]


def race(runs: Sequence[Sequence[Evaluated]], margin: float) -> tuple[dict[int, Reason], float]:
    """The runs that a race stops, one run after the other, and the share of evaluations that were made.

    runs: the candidates of each, evaluated on all images; a run stops where all of its candidates do.
    """
    images = len(runs[0][0].differences)
    whole: list[Evaluated] = []
    stopped: dict[int, Reason] = {}
    made = 0
    for index, run in enumerate(runs):
        for seen in racing.block_ends(images):
            so_far = [replace(one, differences=one.differences[:seen]) for one in run]
            reasons = [racing.reason_to_stop(one, whole, images, margin) for one in so_far]
            if all(reasons):
                stopped[index] = reasons[0] or Reason.futility
                break
        else:
            whole += run
        made += seen
    return stopped, made / (images * len(runs))


def one_study(images: int, loss: float, difficult: bool, number: int) -> Raced:
    """A race in the study of this number, of a mix of settings. loss: the median of their true losses."""
    rng = np.random.default_rng([number, images, round(1e4 * loss), difficult])
    common = rng.standard_normal(SETTINGS)
    losses = np.minimum(loss * np.exp(decision.SPREAD * common), decision.FP32 / 2)
    other = decision.TRADE * common + np.sqrt(1 - decision.TRADE**2) * rng.standard_normal(SETTINGS)
    speeds = np.maximum(decision.MEDIAN_SPEED * np.exp(decision.SPEED_SPREAD * other), 1.1)
    chance = decision.CHANCE / 2
    law = Law(images, difficult=difficult)
    right, answers = decision.drawn(rng, law, chance + losses, np.full(SETTINGS, chance))
    study = decision.made(right, answers, speeds)
    best = decision.recommended(study)
    differences = (answers[0].astype(np.int8) - right.astype(np.int8))[:, statistics.random_order(images)]
    runs = [
        [Evaluated(difference, study.latencies[record.run_id][0])]
        for difference, record in zip(differences, study.records, strict=True)
    ]
    stopped, share = race(runs, MARGIN)
    return Raced(best is not None, best in stopped, share, Counter(stopped.values()))


def runs_of(study: Study) -> dict[str, list[Evaluated]]:
    """The candidates of each finished run of a study, in the order of the runs, by run id."""
    question = replace(QUESTION, margin=margin_of(study, QUESTION))
    where = next(iter(conditions(study, question)), None)
    found: dict[str, list[Evaluated]] = {}
    for record in study.finished:
        alone = Study((record,), study.top1, study.latencies)
        top1 = study.top1[record.run_id]
        place = statistics.random_order(len(top1.labels))
        fp32 = (top1.fp32 == top1.labels).astype(np.int8)
        for one in candidates(alone, question):
            difference = (top1.int8[one.runtimes[0]] == top1.labels).astype(np.int8) - fp32
            timing = study.latency(record, one.runtime, where) if where else None
            found.setdefault(record.run_id, []).append(
                Evaluated(difference[place], timing if timing and timing.valid else None)
            )
    return found


def race_again(outputs: Path) -> None:
    """Print what racing would have done in the studies of runs that were made."""
    store = tracking.connect_existing(Connection(None, None, 10.0), outputs)
    by_study: dict[str, list[str]] = {}
    everything = tracking.find_runs(store, filter="attributes.status = 'FINISHED'").records
    for record in everything:
        by_study.setdefault(record.tags.get("study", ""), []).append(record.run_id)
    for name, ids in by_study.items():
        records = [record for record in everything if record.run_id in ids and "qexp.sweep" not in record.tags]
        for study in studies(records, tracking.top1(store, records)):
            if len(study.top1) == len(study.finished) > 1:
                print(f"{name or 'no study'}: {said(study)}", flush=True)


def said(study: Study) -> str:
    """A sentence on a study's runs that racing would have stopped, and on the images saved."""
    runs = runs_of(study)
    found = recommend(study, replace(QUESTION, margin=None))
    stopped, share = race(list(runs.values()), found.margin)
    answer = str(found.kind)
    if found.kind is Answer.ship and found.chosen:
        best = {one.run_id for one in found.chosen.records}
        dropped = any(list(runs)[index] in best for index in stopped)
        answer = f"{found.chosen.ships.name}, {'dropped' if dropped else 'kept'}"
    return (
        f"{len(runs)} runs on {found.images:,} images, {100 * found.margin:g} points: {share:.0%} evaluated, "
        f"stopped for {_reasons(Counter(stopped.values()), len(runs))}; all images recommend: {answer}"
    )


def _reasons(stopped: Mapping[Reason, int], total: int) -> str:
    return ", ".join(f"{reason} {stopped[reason] / total:.0%}" for reason in Reason)


def races(outputs: str) -> None:
    """Print, for several numbers of images and mixes of settings, what racing drops and saves."""
    if runs := os.environ.get(RUNS):
        race_again(Path(runs))
    print(f"{STUDIES} studies of {SETTINGS} settings each, evaluated one after the other in {racing.BLOCKS} blocks;")
    print(f"margin {100 * MARGIN:g} points; dropped: what all images recommend was stopped")
    print(" images median loss difficulty  recommended  dropped [95%]      evaluated  stopped for")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("forkserver")) as executor:
        for images, loss, difficult in MIXES:
            task = partial(one_study, images, loss, difficult)
            found = list(executor.map(task, range(STUDIES), chunksize=max(STUDIES // 20, 1)))
            dropped = statistics.wilson(sum(one.dropped for one in found), STUDIES)
            stopped = sum((one.stopped for one in found), Counter[Reason]())
            print(
                f"{images:>7,} {100 * loss:>11.2f} {'differs' if difficult else 'alike':>10}  "
                f"{np.mean([one.recommended for one in found]):>11.0%}  "
                f"{dropped.value:.1%} [{dropped.low:.1%}, {dropped.high:.1%}]  "
                f"{np.mean([one.share for one in found]):>9.0%}  {_reasons(stopped, STUDIES * SETTINGS)}",
                flush=True,
            )
