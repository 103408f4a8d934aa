"""Recommendations on simulated studies, whose true losses are known: how often they are wrong, and what they leave.

A study is simulated as the records and predicted classes of its runs, and answered by `report.decision.recommend`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import optimize, stats
from tqdm import tqdm

from benchmarks.size import sized
from qexp import statistics
from qexp.config.schema import Report, ReportObjective
from qexp.metrics import Metric
from qexp.records import SAME_TAG, Interval, RunRecord, Top1
from qexp.report import decision
from qexp.report.decision import Answer
from qexp.report.study import Study, studies

T = TypeVar("T")

STUDIES = sized(500, 2)
SETTINGS = sized(48, 4)
MARGIN = 0.005
QUESTION = Report(True, ReportObjective.fastest, MARGIN, None, None, None, None)
FP32 = 0.9  # accuracy, where images are simulated
SEEDS = 3
# The images that one calibration seed answers otherwise than FP32 are those of another with this probability, or else
# drawn anew.
SHARED = 0.7

# Studies in which every setting loses the margin.
IMAGES = sized((744, 2000, 10_000), (744,))
DISCORDANCES = sized((0.008, 0.02, 0.05, 0.1), (0.02,))

# Studies of a mix of settings, of which two in five lose more than the margin. The lossy ones tend to be faster.
MIXED_IMAGES = sized((744, 2000, 10_000, 50_000), (744,))
MEDIAN_LOSS, SPREAD = 0.004, 1.0  # of a log-normal law
CHANCE = 0.01  # images that are answered otherwise beside those lost, as many won as lost
MEDIAN_SPEED, SPEED_SPREAD, TRADE = 2.5, 0.25, 0.5  # of a log-normal law, and its correlation with the loss
TIMING = 0.02  # half of the interval of a log speedup
SET_ASIDE = 0.3

# A few images are difficult whatever the setting. Those of a run's predictions.npz, if this environment variable names
# one: logits move by normal noise, and images with a small gap are answered otherwise. Without, a beta law of this
# shape of an image's probability to be answered otherwise.
PREDICTIONS = "QEXP_BENCH_PREDICTIONS"
SHAPE = 0.2
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Law:
    """The way in which studies are drawn: the number of images, of calibration seeds, and whether some images are more
    difficult than others."""

    images: int
    seeds: int = 1
    difficult: bool = False


# ---- Simulated studies


def drawn(rng: np.random.Generator, law: Law, broken: np.ndarray, mended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP32 right, bool [images], and INT8 right, bool [seeds, settings, images].

    broken, mended: of each setting, the share of all images that FP32 alone, INT8 alone has right, in the long run.
    """
    right, chance = _difficult(rng, law, broken, mended) if law.difficult else _alike(rng, law, broken, mended)
    common = rng.random(chance.shape, dtype=np.float32)
    answers = []
    for _ in range(law.seeds):
        draw = common
        if law.seeds > 1:
            again = rng.random(chance.shape, dtype=np.float32) >= SHARED
            draw = np.where(again, rng.random(chance.shape, dtype=np.float32), common)
        answers.append(right ^ (draw < chance))
    return right, np.stack(answers)


def _alike(rng: np.random.Generator, law: Law, broken: np.ndarray, mended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP32 right, and the chance that INT8 answers otherwise, [settings, images], the same for all that FP32 has right
    and for all others."""
    right = rng.random(law.images) < FP32
    return right, np.where(right, broken[:, None] / FP32, mended[:, None] / (1 - FP32))


def _difficult(
    rng: np.random.Generator, law: Law, broken: np.ndarray, mended: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same, of images that differ."""
    rates, which = np.unique(np.stack([broken, mended], axis=1), axis=0, return_inverse=True)
    if path := os.environ.get(PREDICTIONS):
        right, gap = _gaps(path)
        chosen = rng.integers(len(right), size=law.images)
        noise = np.array(
            [[_noise(path, rate, kind) for rate, kind in zip(pair, (True, False), strict=True)] for pair in rates]
        )
        chance = stats.norm.sf(gap[chosen] / np.where(right[chosen], noise[:, :1], noise[:, 1:]))
        return right[chosen], chance[which.ravel()]
    right, quantile = rng.random(law.images) < FP32, rng.random(law.images)
    mean = np.where(right, rates[:, :1] / FP32, rates[:, 1:] / (1 - FP32))
    return right, stats.beta.ppf(quantile, SHAPE, SHAPE * (1 - mean) / mean)[which.ravel()]


@cache
def _gaps(path: str) -> tuple[np.ndarray, np.ndarray]:
    """FP32 right, bool [images], and the gap between the right class's logit and the largest other, without sign."""
    with np.load(path, allow_pickle=False) as file:
        logits, labels = file["fp32"].astype(np.float64), file["labels"]
    own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    np.put_along_axis(logits, labels[:, None], -np.inf, axis=1)
    gap = own - logits.max(axis=1)
    return gap > 0, np.abs(gap)


@cache
def _noise(path: str, rate: float, of_right: bool) -> float:
    """The standard deviation of a gap's noise that answers this share of all images otherwise."""
    right, gap = _gaps(path)
    gaps = gap[right == of_right]

    def excess(log_noise: float) -> float:
        return float(stats.norm.sf(gaps / np.exp(log_noise)).sum() / len(gap)) - rate

    return float(np.exp(optimize.brentq(excess, -20, 20)))


def made(right: np.ndarray, answers: np.ndarray, speeds: np.ndarray, share: float = 0) -> Study:
    """The study of runs with these answers, [seeds, settings, images], and speedups [settings]."""
    labels, fp32 = np.zeros(len(right), dtype=np.int32), (~right).astype(np.int32)
    records, classes = [], {}
    for seed, of_seed in enumerate(answers):
        for index, (answer, speed) in enumerate(zip(of_seed, speeds.tolist(), strict=True)):
            name = f"{index}.{seed}"
            metrics: dict[str, float] = {
                Metric.images: float(len(right)),
                Metric.fp32_only.of("eager"): float(np.sum(right & ~answer)),
                Metric.int8_only.of("eager"): float(np.sum(answer & ~right)),
                Metric.runtime_speedup.of("eager"): speed,
                Metric.runtime_speedup_low.of("eager"): speed * np.exp(-TIMING),
                Metric.runtime_speedup_high.of("eager"): speed * np.exp(TIMING),
                Metric.latency_fp32: 10.0,
                Metric.runtime_latency.of("int8_eager"): 10 / speed,
            }
            params = {"observer": str(index), "calib.seed": str(seed), "evaluate.select_share": str(share)}
            tags = {SAME_TAG: "eager", "latency_valid": "true"}
            records.append(RunRecord(name, name, "FINISHED", params=params, metrics=metrics, tags=tags))
            classes[name] = Top1(labels, fp32, {"eager": (~answer).astype(np.int32)}, ())
    return studies(records, classes)[0]


def recommended(study: Study) -> int | None:
    """The index of the setting that is recommended, None where none is."""
    found = decision.recommend(study, QUESTION)
    return int(found.chosen.setting["observer"]) if found.kind is Answer.ship and found.chosen else None


# ---- Every setting loses the margin


def at_the_margin(law: Law, discordance: float, number: int) -> bool:
    """True where a setting is recommended in the study of this number, in which each loses the margin."""
    rng = np.random.default_rng([number, law.images, law.seeds, law.difficult, round(1e4 * discordance)])
    broken, mended = (np.full(SETTINGS, (discordance + loss) / 2) for loss in (MARGIN, -MARGIN))
    speeds = MEDIAN_SPEED * np.exp(SPEED_SPREAD * rng.standard_normal(SETTINGS))
    return recommended(made(*drawn(rng, law, broken, mended), np.maximum(speeds, 1.1))) is not None


# ---- A mix of settings

# In the order of `of_a_mix`, as the figure names them.
RULES = (
    "qexp: shown to be within the margin",
    f"qexp with select_share={SET_ASIDE}",
    "fastest whose estimate is within the margin",
    "first of a list whose estimate is within the margin",
)


@dataclass(frozen=True)
class Picked:
    """The choice of one rule in one study. breaks: it loses more than the margin; left: of the speed of the fastest
    setting that doesn't, the share left on the table, FP32 being chosen where nothing is; nothing: nothing is."""

    breaks: bool
    left: float
    nothing: bool


def of_a_mix(images: int, number: int) -> list[Picked]:
    """The choices of all RULES in the study of this number."""
    rng = np.random.default_rng([number, images])
    common = rng.standard_normal(SETTINGS)
    loss = np.minimum(MEDIAN_LOSS * np.exp(SPREAD * common), FP32 / 2)
    other = TRADE * common + np.sqrt(1 - TRADE**2) * rng.standard_normal(SETTINGS)
    speeds = np.maximum(MEDIAN_SPEED * np.exp(SPEED_SPREAD * other), 1.1)
    seen = speeds * np.exp(TIMING / 1.96 * rng.standard_normal(SETTINGS))
    right, answers = drawn(rng, Law(images), CHANCE / 2 + loss, np.full(SETTINGS, CHANCE / 2))
    within = np.flatnonzero(answers[0].mean(axis=1) - right.mean() >= -MARGIN)
    choices = [
        recommended(made(right, answers, seen)),
        recommended(made(right, answers, seen, SET_ASIDE)),
        int(within[np.argmax(seen[within])]) if len(within) else None,
        int(within[0]) if len(within) else None,
    ]
    best = float(speeds[loss <= MARGIN].max(initial=1.0))
    return [
        Picked(
            index is not None and bool(loss[index] > MARGIN),
            1 - (1.0 if index is None else speeds[index]) / best,
            index is None,
        )
        for index in choices
    ]


# ---- The benchmark


def recommendations(outputs: str) -> None:
    """Print how often settings are recommended that lose the margin, and how rules compare on a mix of settings."""
    kinds = [(1, False, DISCORDANCES), (1, True, DISCORDANCES[::3]), (SEEDS, False, DISCORDANCES[::3])]
    print(f"{STUDIES} studies of {SETTINGS} settings that all lose the margin, {100 * MARGIN:g} points: recommended in")
    print(f"difficult images: {os.environ.get(PREDICTIONS) or f'a beta law of shape {SHAPE}'}")
    print(f"{'images':>7} {'otherwise':>9} {'seeds':>5} {'difficulty':>10}  recommended [95%]", flush=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("forkserver")) as executor:
        for seeds, difficult, discordances in kinds:
            for images, discordance in itertools.product(IMAGES, discordances):
                task = partial(at_the_margin, Law(images, seeds, difficult), discordance)
                found = statistics.wilson(sum(_each(executor, task, f"{images} images")), STUDIES)
                of_images = f"{images:>7,} {discordance:>9.1%} {seeds:>5} {'differs' if difficult else 'alike':>10}"
                print(f"{of_images}  {found.value:.1%} [{found.low:.1%}, {found.high:.1%}]", flush=True)
        mixed = {
            images: list(_each(executor, partial(of_a_mix, images), f"{images} images")) for images in MIXED_IMAGES
        }
    print(f"\n{STUDIES} studies of a mix of {SETTINGS} settings, two in five of which lose more than the margin")
    print(f"{'images':>7}  breaks the margin  speed left  no answer  rule")
    for images, picks in mixed.items():
        for rule, of_rule in zip(RULES, zip(*picks, strict=True), strict=True):
            breaks, left, nothing = summarised(of_rule)
            print(f"{images:>7,}  {breaks.value:>17.1%}  {left.value:>10.1%}  {nothing:>9.1%}  {rule}")
    draw(mixed, ROOT / "docs" / "decision.png" if sized(True, False) else Path(outputs) / "decision.png")


def _each(executor: ProcessPoolExecutor, task: Callable[[int], T], title: str) -> Iterator[T]:
    found = executor.map(task, range(STUDIES), chunksize=max(STUDIES // 20, 1))
    yield from tqdm(found, total=STUDIES, desc=title, disable=None, leave=False)


def summarised(picks: Sequence[Picked]) -> tuple[Interval, Interval, float]:
    """For one rule, the share of studies in which its choice breaks the margin; of the others, the mean share of the
    speed left on the table; and the share without an answer."""
    breaks = statistics.wilson(sum(one.breaks for one in picks), len(picks))
    left = [one.left for one in picks if not one.breaks]
    speed = (
        statistics.mean_interval(left) if len(left) > 1 else Interval(float(np.mean(left or [np.nan])), 0, 1, 0.95, "")
    )
    return breaks, speed, float(np.mean([one.nothing for one in picks]))


# Okabe and Ito's colours, which the colour-blind tell apart; markers differ as well.
STYLES = (("#0072B2", "o", "-"), ("#56B4E9", "s", "--"), ("#D55E00", "^", "-"), ("#E69F00", "v", "--"))


def draw(mixed: Mapping[int, Sequence[Sequence[Picked]]], path: Path) -> None:
    """Write the figure of what each rule gets wrong and leaves, by the number of test images."""
    figure = Figure(figsize=(10, 4.6))
    FigureCanvasAgg(figure)
    wrong, left = figure.subplots(1, 2)
    sizes = list(mixed)
    for index, (rule, (colour, marker, line)) in enumerate(zip(RULES, STYLES, strict=True)):
        found = [summarised([picks[index] for picks in mixed[images]])[:2] for images in sizes]
        for axes, part in ((wrong, 0), (left, 1)):
            values = np.array(
                [[100 * getattr(each[part], name) for name in ("value", "low", "high")] for each in found]
            )
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            axes.errorbar(
                sizes,
                values[:, 0],
                errors,
                label=rule,
                color=colour,
                marker=marker,
                linestyle=line,
                capsize=2,
                markersize=6,
                zorder=10 - index,
            )
    wrong.set_title("How often the chosen setting breaks the margin", fontsize=11, loc="left")
    left.set_title("Speed left on the table (FP32 where nothing is chosen)", fontsize=11, loc="left")
    wrong.axhline(2.5, color="#8C8C8C", linewidth=1, linestyle=":")
    wrong.annotate(
        "2.5%, what qexp promises at most",
        (sizes[0], 2.5),
        (0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#595959",
    )
    for axes in (wrong, left):
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{images:,}" for images in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
        axes.set_xlabel("test images")
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    wrong.set_ylabel("% of studies")
    left.set_ylabel("% slower than the fastest there is")
    figure.legend(*wrong.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, fontsize=9)
    figure.text(
        0.008, 0.975,
        f"{STUDIES} simulated studies of {SETTINGS} settings, margin {100 * MARGIN:g} points, which two in five lose",
        fontsize=9, color="#595959", va="top",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.12, 1, 0.95), w_pad=3)
    figure.savefig(path, dpi=150, facecolor="white")
    print(f"drawn in {path.name}")
