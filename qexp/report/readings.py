"""One-line readings of effects, interactions, calibration, layers and classes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from qexp.report import formats
from qexp.report.classes import ClassChange
from qexp.report.effects import Axis, AxisKind, CalibrationSamples, CalibrationSizes, Interaction, Size, spreads
from qexp.report.layers import LayerComparison


def axis(found: Axis) -> str:
    """A setting's effect in one line; what is within noise is called so."""
    if found.kind is AxisKind.nothing:
        return f"{found.setting} changed nothing."
    if found.kind is AxisKind.unknown:
        return f"{found.setting}: can't be told from these runs."
    if found.kind is AxisKind.within_noise:
        return f"{found.setting}: within noise."
    parts = []
    for effect in found.effects:
        told = []
        if effect.accuracy and effect.accuracy.shown:
            told.append(f"{formats.difference(effect.accuracy.interval)} points")
        if effect.speed and effect.speed.shown:
            told.append(f"{formats.factor(effect.speed.interval)} as fast")
        if told:
            parts.append(f"{effect.value} against {found.first}: {', '.join(told)}")
    return f"{found.setting}: {'; '.join(parts)}."


def interaction(found: Interaction) -> str:
    return f"{found.row} with {found.column}: " + (
        "more than the sum of both." if found.shown else "no more than the sum of both is shown."
    )


def layers(found: LayerComparison) -> list[str]:
    return [f"Keep in FP32 first: {', '.join(found.keep[:5])}."] if found.keep else []


def classes(found: Sequence[ClassChange]) -> list[str]:
    worst = found[0]
    noise = "" if worst.shown else ", within noise"
    return [f"The class that loses most is {worst.name}: {formats.difference(worst.change)} points{noise}."]


def samples(found: Sequence[CalibrationSamples]) -> str:
    """How much the draw of calibration images matters, beside the draw of test images."""
    both = spreads(found)
    within = f"[{formats.points(both.samples.low)}, {formats.points(both.samples.high)}]"
    return (
        f"Another draw of calibration images (calib.seed) changes accuracy by a standard deviation of "
        f"{formats.points(both.samples.value)} points {within}; other test images "
        f"would change it by {formats.points(both.images)}."
    )


def calibration(found: Sequence[CalibrationSizes]) -> list[str]:
    """A sentence on how many calibration images are enough, for each combination of the other settings; combinations of
    which the same is to be said share one. See `statistics.plateau` for the rule.
    """
    conclusions: dict[str, list[str]] = {}
    for one in found:
        which = " ".join(f"{name}={value}" for name, value in one.settings.items())
        conclusions.setdefault(_conclusion(one), []).append(which)
    lines = []
    for said, (first, *others) in conclusions.items():
        which = f"{1 + len(others)} combinations of the other settings" if others else first
        lines.append(f"With {which}, {said}" if which else said[:1].upper() + said[1:])
    return lines


def _conclusion(found: CalibrationSizes) -> str:
    sizes, plateau = found.sizes, found.plateau
    if plateau is None:
        return _undecided(sizes)
    start, largest = sizes[plateau.index], sizes[-1]
    if start is largest:
        gain = plateau.gains[-1]
        brings = f"{_label(largest)}, {formats.difference(gain)} points over {_label(sizes[-2])}"
        if largest.batches is None:
            return f"accuracy rises up to {brings}: more calibration helps, and there is no more."
        return f"accuracy still rises at the largest size tried, {brings}: more may help."
    text = f"from {_label(start)} on no rise of the mean accuracy is shown"
    most = max(gain.high for gain in plateau.gains)
    worst, gain = min(zip(sizes[plateau.index + 1 :], plateau.gains, strict=True), key=lambda pair: pair[1].high)
    worse = f"worse, {_label(worst)} by {formats.difference(gain)} points."
    if most <= 0:
        return f"{text}, and every larger size is {worse}"
    spread = f"95%; SD of samples {formats.points(plateau.spread)}"
    text += f", but one of up to {formats.points(most)} points is possible ({spread})"
    error = f"the sampling error of a run (±{formats.points(found.sampling)})"
    if found.enough is None:
        text += f", and more than {error} at every size: more samples (calib.seed) would tell"
    elif found.enough <= plateau.index:
        text += f", less than {error}: more calibration would hardly help"
    else:
        text += f"; from {_label(sizes[found.enough])} on it is less than {error}, so more than that would hardly help"
    return f"{text}; more can be {worse}" if gain.high < 0 else f"{text}."


def _label(size: Size) -> str:
    """`8 batches (128 images)`, `all 898 images`."""
    if size.batches is None:
        return "all images" if size.images is None else f"all {size.images:,.0f} images"
    number = "" if size.images is None else f" ({size.images:,.0f} images)"
    return f"{size.batches} batch{'es' if size.batches != 1 else ''}{number}"


def _undecided(sizes: Sequence[Size]) -> str:
    if all(len(size.accuracies) == 1 for size in sizes):
        return (
            "with one sample of calibration images a size, what the size does can't be told apart from what the "
            "sample does; calib.sampling=random calib.seed=0,1,2 would."
        )
    means = [fmean(size.accuracies) for size in sizes]
    return (
        "the samples of a size don't differ on these test images, so there is no spread to hold the sizes against; "
        f"their mean accuracies lie within {formats.points(max(means) - min(means))} points."
    )
