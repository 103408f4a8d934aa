"""One-line readings of effects, interactions, calibration, layers and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from qexp.report import formats
from qexp.report.calibration import CalibrationSamples, CalibrationSizes, Size, Winners, spreads
from qexp.report.classes import ClassChange
from qexp.report.contrasts import Difference
from qexp.report.effects import Axis, AxisKind, Departure, Interaction
from qexp.report.layers import LayerComparison


def axis(found: Axis) -> str:
    """A setting's effects in one line: on accuracy, then on speed; what is within noise is called so."""
    accuracies = [(effect.value, effect.accuracy) for effect in found.effects if effect.accuracy]
    speeds = [(effect.value, effect.speed) for effect in found.effects if effect.speed]
    if found.kind is AxisKind.nothing:
        timed = ", and so is the timing" if speeds else ""
        return f"{found.setting} changed nothing: every prediction is the same{timed}."
    if not accuracies and not speeds:
        return f"{found.setting}: can't be told, since no two runs differ in it alone."
    told = []
    if accuracies:
        told.append(f"accuracy: {_told(accuracies, _points, lambda most: f'{formats.points(most)} points')}")
    if speeds:
        told.append(f"speed: {_told(speeds, _factor, _percent)}")
    return f"{found.setting}: against {found.first}, {'; '.join(told)}."


def _told(
    known: Sequence[tuple[str, Difference]], text: Callable[[Difference], str], bound: Callable[[float], str]
) -> str:
    """The differences that are shown one by one, the others with the most that they could be."""
    if all(one.nothing for _, one in known):
        return "the same"
    told = [f"{value} {text(one)}" for value, one in known if one.shown]
    told += [f"{value} {text(one)}, how sure isn't known" for value, one in known if one.interval is None]
    noise = [one.bound for _, one in known if one.interval and not one.shown]
    if noise:
        told.append(f"{'the others ' if told else ''}within noise ({bound(max(noise))} at most)")
    return ", ".join(told)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(found: Difference) -> str:
    return f"{formats.difference(found.interval) if found.interval else formats.signed(found.value)} points"


def _factor(found: Difference) -> str:
    ends = f" [{found.interval.low:.2f}, {found.interval.high:.2f}]" if found.interval else ""
    return f"×{found.value:.2f}{ends}"


def interaction(found: Interaction) -> str:
    """How far the effects of two settings depend on each other, in one line."""
    accuracy, speed = found.accuracy_departure, found.speed_departure
    told = []
    if accuracy and accuracy.difference.shown:
        told.append(f"{_step(found, accuracy)} changes accuracy by {_points(accuracy.difference)} more")
    if speed and speed.difference.shown:
        told.append(f"{_step(found, speed)} changes speed by another {_factor(speed.difference)}")
    if told:
        return f"{'; '.join(told)}."
    bounds = [f"{formats.points(one.bound)} points" for one in _known(accuracy)]
    bounds += [_percent(one.bound) for one in _known(speed)]
    if not bounds:
        return "The runs can't tell how far the effects of the two depend on each other."
    return f"The effects of the two add up, within noise ({' and '.join(bounds)} at most)."


def _known(departure: Departure | None) -> list[Difference]:
    return [departure.difference] if departure and departure.difference.interval else []


def _step(found: Interaction, departure: Departure) -> str:
    return (
        f"With {found.column}={departure.column} rather than {found.columns[0]}, {found.row}={departure.row} in place "
        f"of {found.rows[0]}"
    )


def layers(found: LayerComparison) -> list[str]:
    """The layers whose own noise stands out, if any."""
    if not found.keep:
        return []
    few = ", ".join(found.keep[:5]) + (f" and {len(found.keep) - 5} more" if len(found.keep) > 5 else "")
    return [f"Layers to keep in FP32 first, for they add the most noise of their own: {few}."]


def classes(found: Sequence[ClassChange]) -> list[str]:
    """The class that loses most, allowing for all having been looked at, and the number of others."""
    worst = found[0]
    if worst.change.value >= 0:
        return ["No class loses accuracy."]
    lost = f"{formats.difference(worst.change)} points on {formats.count(worst.images, 'image')}"
    if not worst.shown:
        return [f"No class is shown to lose accuracy. The largest loss, within noise, is that of {worst.name}: {lost}."]
    more = sum(one.shown and one.change.value < 0 for one in found) - 1
    rest = f"; {formats.count(more, 'other class') if more == 1 else f'{more} other classes'} too" if more else ""
    return [f"The class that is shown to lose most is {worst.name}: {lost}{rest}."]


def winners(found: Winners) -> str:
    """How often the most accurate setting changes with calibration's seed."""
    which = f"The most accurate of {found.settings} settings"
    if not found.changes:
        return f"{which} is the same with each of {len(found.winners)} calibration seeds."
    pairs = f"{found.changes} of {formats.count(found.pairs, 'pair')} of calibration seeds"
    return f"{which} is another one in {pairs}: a lead that a seed can turn is chance."


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
