"""Tables of tracked runs: a sweep's summary, effects of settings, calibration samples and sizes, and every latency.

Accuracies are fractions of 1; differences between them are printed in points (hundredths). What is computed is in
`qexp/report/effects.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev

from tabulate import tabulate

from qexp.config.identity import NOT_APPLICABLE
from qexp.config.schema import RuntimeName
from qexp.metrics import Metric
from qexp.records import CUDA, PRECISIONS, Interval, RunRecord, VerdictKind
from qexp.report import effects, sentences
from qexp.report.effects import together
from qexp.report.study import finished, value

# With more runs than this, the table of latencies shows their range instead of each.
MOST_RUNS = 12

# The headings of the columns.
ACCURACY = f"{Metric.accuracy_fp32.heading} → {Metric.accuracy_int8.heading}"
POINTS = f"{Metric.accuracy_delta.heading} [95%]"
LATENCY = f"{Metric.latency_int8.heading}, {Metric.latency_int8.unit}"
SPEEDUP = f"{Metric.speedup.heading} [95%]"
SIZE = f"{Metric.size_int8.heading}, {Metric.size_int8.unit}"
LAYERS = Metric.layers_int8.heading

# Sizes of saved models that differ by less are said once, below the table.
SAME_SIZE = 0.02


def runs(records: Sequence[RunRecord]) -> str:
    """A line for each finished run, in the order given; below it what they share, and notes, each once and numbered.

    Where the target's CPU is another one (`effects.SOURCES`), accuracies and interval are the target's. A
    timing that can't be trusted has a `?`.
    """
    done = finished(records)
    if not done:
        return "No run was finished."
    shared = _shared(done)
    numbers: dict[str, int] = {}

    def marked(record: RunRecord) -> dict[str, str]:
        notes = _notes(record)
        return {
            column: cell + "".join(f" ({numbers.setdefault(n, len(numbers) + 1)})" for n in notes.get(column, []))
            for column, cell in _cells(record).items()
            if column not in shared
        }

    lines = [marked(record) for record in done]
    columns = [column for column in lines[0] if any(line[column] for line in lines)]
    verdict, rest = shared.get("verdict"), [text for column, text in shared.items() if column != "verdict"]
    below = [
        *([f"verdict{' of every run' if len(done) > 1 else ''}: {verdict}"] if verdict else []),
        *([f"every run: {', '.join(rest)}"] if rest else []),
        *([] if verdict else _legend(done)),
        *(f"({number}) {note}" for note, number in numbers.items()),
    ]
    return "\n".join([_table([[line[column] for column in columns] for line in lines], columns), *below])


def line(record: RunRecord) -> str:
    """One finished run in one line, without headings."""
    cells, accuracy = _cells(record), effects.accuracy(record)
    if accuracy and accuracy.source:
        cells[ACCURACY] += f" ({accuracy.source})"
    cells["verdict"] = sentences.conclusion(record.verdict) if record.verdict else ""
    return "  ".join(cell for cell in cells.values() if cell)


def failures(records: Sequence[RunRecord]) -> str:
    """A line for each run that did not finish, with its sentence."""
    ended = [record for record in records if record.status != "FINISHED"]
    return "\n".join(f"{record.status}  {record.name}: {record.tags.get('error', '')}" for record in ended)


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return str(tabulate(lines, headers, tablefmt="simple", disable_numparse=True))


def _cells(record: RunRecord) -> dict[str, str]:
    """The record by the headings of its columns, empty where nothing is known."""
    accuracy, mark = effects.accuracy(record), _untrusted(record)
    ms = together(record, Metric.latency_fp32, Metric.latency_int8)
    speedup = together(record, Metric.speedup, Metric.speedup_low, Metric.speedup_high)
    size = together(record, Metric.size_fp32, Metric.size_int8)
    layers = together(record, Metric.layers_int8, Metric.layers_float)
    ratio, *ends = map(Metric.speedup.text, speedup) if speedup else ("",)
    return {
        "run": record.name,
        ACCURACY: _arrow(Metric.accuracy_int8, accuracy.fp32, accuracy.int8) if accuracy else "",
        POINTS: f"{_signed(accuracy.delta.value)} {_ends(accuracy.delta)}" if accuracy else "",
        "verdict": sentences.short(record.verdict) if record.verdict else "",
        LATENCY: f"{_arrow(Metric.latency_int8, *ms)}{mark}" if ms else "",
        SPEEDUP: f"{ratio}×{mark} [{', '.join(ends)}]" if speedup else "",
        SIZE: _arrow(Metric.size_int8, *size) if size else "",
        LAYERS: f"{layers[0]:.0f} of {sum(layers):.0f}" if layers else "",
    }


def _arrow(metric: Metric, fp32: float, int8: float) -> str:
    return f"{metric.text(fp32)} → {metric.text(int8)}"


def _notes(record: RunRecord) -> dict[str, list[str]]:
    """Footnotes to a run, by the column that each is about."""
    reused = record.tags.get("reused")
    accuracy, notes = effects.accuracy(record), {"run": [*record.warnings.values(), *([reused] if reused else [])]}
    if accuracy and accuracy.source:
        # Not of what ran here, and maybe not of all images.
        images, target = record.metrics.get(Metric.target_images), value(record, "target")
        number = "" if images is None else f" on {images:,.0f} images"
        cpu = f"target={target}" if target != NOT_APPLICABLE else "the target's CPU"
        how = f"{effects.SOURCES[accuracy.source]},{number}"
        notes[ACCURACY] = [f"accuracy on {cpu}, {how}: this CPU's kernels give another."]
    if carried := record.tags.get("latency_from"):
        notes[LATENCY] = [f"timed by {carried}, whose INT8 model executes the same operators."]
    if record.verdict and (cause := sentences.cause(record.verdict)):
        notes["verdict"] = [cause]
    return notes


def _legend(done: Sequence[RunRecord]) -> list[str]:
    """A line that explains the short verdicts, each kind with the first number that there is."""
    found = {record.verdict.kind: sentences.explained(record.verdict) for record in done[::-1] if record.verdict}
    parts = [found[kind] for kind in VerdictKind if found.get(kind)]
    return ["; ".join(parts)] if parts else []


def _shared(done: Sequence[RunRecord]) -> dict[str, str]:
    """The cells that are the same in all runs, by column, to be said once below; of a single run only the verdict."""
    verdicts = {sentences.verdict(record.verdict) if record.verdict else "" for record in done}
    layers = {_cells(record)[LAYERS] for record in done}
    result = {"verdict": verdicts.pop()} if len(verdicts) == 1 else {}
    if len(done) > 1:
        result[LAYERS] = f"{layers.pop()} layers in INT8" if len(layers) == 1 and layers != {""} else ""
        result[SIZE] = _shared_size([together(record, Metric.size_fp32, Metric.size_int8) for record in done])
    return {column: text for column, text in result.items() if text}


def _shared_size(sizes: Sequence[Sequence[float]]) -> str:
    text = Metric.size_int8.text
    if not all(sizes) or len({text(fp32) for fp32, _ in sizes}) > 1:
        return ""
    low, high = min(int8 for _, int8 in sizes), max(int8 for _, int8 in sizes)
    if high > (1 + SAME_SIZE) * low:
        return ""
    to = "" if text(low) == text(high) else f" to {text(high)}"
    return f"{_arrow(Metric.size_int8, sizes[0][0], low)}{to} {Metric.size_int8.unit}"


def _ends(interval: Interval) -> str:
    """The ends of an interval of fractions, in points."""
    return f"[{_signed(interval.low)}, {_signed(interval.high)}]"


def _points(fraction: float, sign: str = "") -> str:
    """A fraction in points, its hundredths. sign: `+` for one also where it is positive."""
    return f"{100 * fraction:{sign}.{Metric.accuracy_delta.digits - 2}f}"


def _signed(difference: float) -> str:
    return _points(difference, "+")


def _untrusted(record: RunRecord) -> str:
    return "?" if record.tags.get("latency_valid") == "false" else ""


def latencies(records: Sequence[RunRecord]) -> str:
    """Milliseconds a call (p50) of every precision and runtime that was timed.

    Of a single run every FP32 variant over every INT8 variant; of several a line for each run, and with more than
    MOST_RUNS their lowest, median and highest. The heading names the pair that the speedup compares, the fastest of
    each precision; where it isn't the same in all runs, it has a `*`. Empty where nothing was timed.
    """
    timed = [record for record in finished(records) if _p50s(record)]
    columns = sorted({variant for record in timed for variant in _p50s(record)}, key=_place)
    if not timed:
        return ""
    pairs = Counter(map(_headline, timed))
    shared, each = len(pairs) == 1, len(timed) <= MOST_RUNS
    del pairs[()]
    heading = [f"{Metric.runtime_latency.heading}, {Metric.runtime_latency.unit} (p50)"]
    if pairs and shared:
        heading.append(f"the speedup is {_over(*pairs)}")
    elif pairs:
        compared = ", ".join(f"{_over(pair)} ({number})" for pair, number in pairs.items())
        heading.append(f"{'* ' if each else ''}what the speedup compares: {compared}")
    if untrusted := sum(bool(_untrusted(record)) for record in timed):
        heading.append(f"? not to be trusted ({untrusted} of {len(timed)} runs; the tag latency_reason says why)")
    if len(timed) == 1:
        lines = _each_pair(timed[0], columns)
    else:
        lines = _each_run(timed, columns, starred=not shared) if each else _lowest_to_highest(timed, columns)
    return "\n".join(["; ".join(heading), _table(lines[1:], lines[0])])


def _p50s(record: RunRecord) -> dict[str, float]:
    """p50 in ms of each variant, `<precision>_<runtime>`, that was timed."""
    return Metric.runtime_latency.within(record.metrics)


def _place(variant: str) -> tuple[int, int, str]:
    """A key to sort variants by: FP32 first, then by runtime."""
    precision, _, runtime = variant.partition("_")
    known = [*RuntimeName, CUDA]
    return PRECISIONS.index(precision), known.index(runtime) if runtime in known else len(known), runtime


def _each_pair(record: RunRecord, columns: Sequence[str]) -> list[list[str]]:
    ms = _p50s(record)
    fp32, int8 = ([name for name in columns if name.startswith(precision)] for precision in PRECISIONS)
    lines = [["", "ms", *(f"over {_spoken(name)}, {_p50(record, name)} ms" for name in int8)]]
    for a in fp32:
        lines.append([_spoken(a), _p50(record, a), *(f"{Metric.speedup.text(ms[a] / ms[b])}×" for b in int8)])
    return lines


def _each_run(timed: Sequence[RunRecord], columns: Sequence[str], starred: bool) -> list[list[str]]:
    lines = [["run", *map(_spoken, columns)]]
    for record in timed:
        compared = _headline(record) if starred else ()
        lines.append([record.name, *(_p50(record, name, "*" if name in compared else "") for name in columns)])
    return lines


def _lowest_to_highest(timed: Sequence[RunRecord], columns: Sequence[str]) -> list[list[str]]:
    known = [[ms[name] for record in timed if name in (ms := _p50s(record))] for name in columns]
    ways: dict[str, Callable[[list[float]], float]] = {"lowest": min, "median": median, "highest": max}
    lines = [["run", *map(_spoken, columns)]]
    return lines + [
        [f"{label} of {len(timed)}", *(Metric.runtime_latency.text(way(v)) for v in known)]
        for label, way in ways.items()
    ]


def _p50(record: RunRecord, variant: str, mark: str = "") -> str:
    ms = _p50s(record).get(variant)
    return "" if ms is None else f"{Metric.runtime_latency.text(ms)}{mark}{_untrusted(record)}"


def _headline(record: RunRecord) -> tuple[str, ...]:
    """The variants that the speedup compares, FP32 first; empty where one isn't known."""
    runtimes = [record.tags.get("fastest.fp32"), record.params.get("resolved.runtime")]
    return tuple(f"{p}_{one}" for p, one in zip(PRECISIONS, runtimes, strict=True)) if all(runtimes) else ()


def _over(pair: Sequence[str]) -> str:
    return " over ".join(map(_spoken, pair))


def _spoken(variant: str) -> str:
    return variant.replace("channels_last", "channels-last").replace("_", " ")


def effects_table(records: Sequence[RunRecord]) -> str:
    """The effects as a table; empty where nothing varied."""
    found = effects.effects(records)
    if not found:
        return ""
    lines = [
        {
            "setting": effect.setting,
            "value": effect.value,
            "runs": str(effect.runs),
            "INT8 accuracy": Metric.accuracy_int8.text(effect.accuracy),
            "points to first": "" if effect.delta_accuracy is None else _signed(effect.delta_accuracy),
            "[95%]": _ends(effect.interval) if effect.interval else "",
            "speedup": "" if effect.speedup is None else f"{Metric.speedup.text(effect.speedup)}×",
            "to first": "" if effect.delta_speedup is None else f"{effect.delta_speedup:+.2f}",
        }
        for effect in found
    ]
    known = any(effect.interval for effect in found)
    columns = [column for column in lines[0] if known or column != "[95%]"]
    caption = ["[95%]: from pair to pair of runs that differ in this setting alone (t, 3 pairs or more)."] * known
    return "\n".join([_table([[line[c] for c in columns] for line in lines], columns), *caption, *_estimated(records)])


def _estimated(records: Sequence[RunRecord]) -> list[str]:
    """A note where accuracies aren't those above, since a target's may have been measured on part of the images."""
    if all(math.isclose(accuracy.comparable, accuracy.int8, abs_tol=1e-9) for _, accuracy in effects.compared(records)):
        return []
    return ["INT8 accuracy on another CPU: FP32's on all test images plus the difference on those measured."]


def calibration_samples(records: Sequence[RunRecord]) -> str:
    """A table of the spread between calibration samples, for each setting with two samples or more, beside the
    sampling error.

    The two are never added up: to tell which is larger, both are taken as standard deviations. Empty where no setting
    has two samples.
    """
    found = effects.calibration_samples(records)
    if not found:
        return ""
    lines = [
        [
            *group.settings.values(),
            str(len(group.accuracies)),
            *(Metric.accuracy_int8.text(number(group.accuracies)) for number in (fmean, min, max)),
            _points(stdev(group.accuracies)),
            f"±{_points(group.sampling)}",
        ]
        for group in found
    ]
    headers = [*found[0].settings, "samples", "mean INT8", "lowest", "highest", "SD of samples", "sampling error"]
    explained = [
        "SD of samples: what other calibration images (calib.seed) change on the same test images, in points.",
        "sampling error: what other test images would change, half the 95% interval of one run, in points.",
    ]
    return "\n".join([_table(lines, headers), *explained, *_estimated(records), _larger(found)])


def _larger(found: Sequence[effects.CalibrationSamples]) -> str:
    """A sentence that names the larger source of variation; by calibration size, on which the spread depends."""
    spreads, number = effects.spreads(found), sum(len(group.accuracies) for group in found)
    images = f"{_points(spreads.images)} between test images"
    size = next((name for name in found[0].settings if name in effects.CALIBRATION), None)
    if size:
        told: dict[str, list[str]] = {}
        for value in dict.fromkeys(group.settings[size] for group in found):
            here = effects.spreads([group for group in found if group.settings[size] == value])
            more = "samples vary more" if here.samples.value > here.images else "samples vary less"
            told.setdefault(more if here.can_tell else "it can't be told", []).append(value)
        said = "; ".join(f"{which} with {size}={', '.join(values)}" for which, values in told.items())
        return f"As standard deviations, against {images}: {said}."
    ordered = ("calibration samples", "test images")
    a, b = ordered if spreads.samples.value > spreads.images else ordered[::-1]
    if spreads.can_tell:
        said = f"the {a} are the larger source of chance, so more of them tell more than more {b}"
    else:
        said = f"the {a} seem to be the larger source of chance, but {number} samples can't settle it"
    overall = "" if len(found) == 1 else " over all settings"
    within = f"95% [{_points(spreads.samples.low)}, {_points(spreads.samples.high)}]"
    between = f"{_points(spreads.samples.value)} between calibration samples{overall} ({within})"
    return f"As standard deviations, {between} against {images}: {said}."


def calibration_sizes(records: Sequence[RunRecord]) -> str:
    """A sentence on how many calibration images are enough, for each combination of the other settings; combinations of
    which the same is to be said share one.

    Empty where `calib.batches` didn't vary. See `statistics.plateau` for the rule.
    """
    conclusions: dict[str, list[str]] = {}
    for found in effects.calibration_sizes(records):
        which = "".join(f", {name}={value}" for name, value in found.settings.items())
        conclusions.setdefault(_conclusion(found), []).append(which)
    lines = []
    for said, (first, *others) in conclusions.items():
        which = f", {1 + len(others)} combinations of the other settings" if others else first
        lines.append(f"calibration size{which}: {said}")
    return "\n".join(lines)


def _conclusion(found: effects.CalibrationSizes) -> str:
    sizes, plateau = found.sizes, found.plateau
    if plateau is None:
        return _undecided(sizes)
    start, largest = sizes[plateau.index], sizes[-1]
    if start is largest:
        gain = plateau.gains[-1]
        brings = f"{_label(largest)}, {_signed(gain.value)} points {_ends(gain)} over {_label(sizes[-2])}"
        if largest.batches is None:
            return f"accuracy rises up to {brings}: more calibration helps, and there is no more."
        return f"accuracy still rises at the largest size tried, {brings}: more may help."
    text = f"from {_label(start)} on no rise of the mean accuracy is shown"
    most = max(gain.high for gain in plateau.gains)
    worst, gain = min(zip(sizes[plateau.index + 1 :], plateau.gains, strict=True), key=lambda pair: pair[1].high)
    worse = f"worse, {_label(worst)} by {_signed(gain.value)} points {_ends(gain)}."
    if most <= 0:
        return f"{text}, and every larger size is {worse}"
    text += f", but one of up to {_points(most)} points is possible (95%; SD of samples {_points(plateau.spread)})"
    error = f"the sampling error of a run (±{_points(found.sampling)})"
    if found.enough is None:
        text += f", and more than {error} at every size: more samples (calib.seed) would tell"
    elif found.enough <= plateau.index:
        text += f", less than {error}: more calibration would hardly help"
    else:
        text += f"; from {_label(sizes[found.enough])} on it is less than {error}, so more than that would hardly help"
    return f"{text}; more can be {worse}" if gain.high < 0 else f"{text}."


def _label(size: effects.Size) -> str:
    """`8 batches (128 images)`, `all 898 images`."""
    if size.batches is None:
        return "all images" if size.images is None else f"all {size.images:,.0f} images"
    number = "" if size.images is None else f" ({size.images:,.0f} images)"
    return f"{size.batches} batch{'es' if size.batches != 1 else ''}{number}"


def _undecided(sizes: Sequence[effects.Size]) -> str:
    if all(len(size.accuracies) == 1 for size in sizes):
        return (
            "with one sample of calibration images a size, what the size does can't be told apart from what the "
            "sample does; calib.sampling=random calib.seed=0,1,2 would."
        )
    means = [fmean(size.accuracies) for size in sizes]
    return (
        "the samples of a size don't differ on these test images, so there is no spread to hold the sizes against; "
        f"their mean accuracies lie within {_points(max(means) - min(means))} points."
    )
