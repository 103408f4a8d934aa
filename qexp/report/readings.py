"""One-line readings of effects, interactions, calibration, layers and classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from qexp.records import Interval
from qexp.report import formats
from qexp.report.calibration import CalibrationSamples, CalibrationSizes, Size, Winners, spreads
from qexp.report.classes import ClassChange, can_be_told
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
    """One line on the interaction of two settings."""
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
    if not can_be_told(found):
        most = formats.count(max(one.images for one in found), "image")
        return [f"No class can be judged by itself: none of the {len(found):,} has more than {most}."]
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
    """One line on the number of calibration seeds with which another setting is the most accurate."""
    which = f"The most accurate of {found.settings} settings"
    if not found.changes:
        return f"{which} is the same with each of {len(found.winners)} calibration seeds."
    pairs = f"{found.changes} of {formats.count(found.pairs, 'pair')} of calibration seeds"
    return f"{which} is another one in {pairs}: a lead that a seed can turn is chance."


def samples(found: Sequence[CalibrationSamples]) -> str:
    """One line on the spread that the draw of calibration images causes, beside that of the test images."""
    both = spreads(found)
    within = f"[{formats.points(both.samples.low)}, {formats.points(both.samples.high)}]"
    return (
        f"Another draw of calibration images (calib.seed) changes accuracy by a standard deviation of "
        f"{formats.points(both.samples.value)} points {within}; other test images "
        f"would change it by {formats.points(both.images)}."
    )


def calibration(found: Sequence[CalibrationSizes]) -> list[str]:
    """Sentences on how many calibration images are enough; combinations of the other settings of which the same holds
    share one, with the range of its numbers. See `statistics.plateau` for the rule.
    """
    alike: dict[tuple[object, ...], list[CalibrationSizes]] = {}
    for one in found:
        alike.setdefault(_kind(one), []).append(one)
    lines = []
    for group in alike.values():
        which = " ".join(f"{name}={value}" for name, value in group[0].settings.items())
        if len(group) > 1:
            which = f"{len(group)} combinations of the other settings"
        said = _conclusion(group)
        lines.append(f"With {which}, {said}" if which else said[:1].upper() + said[1:])
    return lines


def _kind(found: CalibrationSizes) -> tuple[object, ...]:
    """Equal for combinations of which `_conclusion` says the same, but for the numbers."""
    plateau, labels = found.plateau, tuple(map(_label, found.sizes))
    if plateau is None:
        return labels, all(len(size.accuracies) == 1 for size in found.sizes)
    most, least = (way(gain.high for gain in plateau.gains) for way in (max, min))
    enough = None if found.enough is None else max(found.enough, plateau.index)
    return labels, plateau.index, enough, most <= 0, least < 0


def _conclusion(alike: Sequence[CalibrationSizes]) -> str:
    first, plateaus = alike[0], [one.plateau for one in alike if one.plateau]
    if not plateaus:
        return _undecided(alike)
    sizes, index = first.sizes, plateaus[0].index
    if index == len(sizes) - 1:
        gain = _gains([plateau.gains[-1] for plateau in plateaus])
        brings = f"{_label(sizes[-1])}, {gain} points over {_label(sizes[-2])}"
        if sizes[-1].batches is None:
            return f"accuracy rises up to {brings}: more calibration helps, and there is no more."
        return f"accuracy still rises at the largest size tried, {brings}: more may help."
    text = f"from {_label(sizes[index])} on no rise of the mean accuracy is shown"
    most = [max(gain.high for gain in plateau.gains) for plateau in plateaus]
    lowest = [min(plateau.gains, key=lambda gain: gain.high) for plateau in plateaus]
    places = {plateau.gains.index(gain) for plateau, gain in zip(plateaus, lowest, strict=True)}
    which = f"{_label(sizes[index + 1 + places.pop()])} by" if len(places) == 1 else "by"
    worse = f"worse, {which} {_gains(lowest)} points."
    if max(most) <= 0:
        return f"{text}, and every larger size is {worse}"
    spread = f"95%; SD of samples {_range(plateau.spread for plateau in plateaus)}"
    text += f", but one of up to {_range(most)} points is possible ({spread})"
    error = f"the sampling error of a run (±{_range(one.sampling for one in alike)})"
    if first.enough is None:
        text += f", and more than {error} at every size: more samples (calib.seed) would tell"
    elif first.enough <= index:
        text += f", less than {error}: more calibration would hardly help"
    else:
        text += f"; from {_label(sizes[first.enough])} on it is less than {error}, so more than that would hardly help"
    return f"{text}; more can be {worse}" if lowest[0].high < 0 else f"{text}."


def _gains(gains: Sequence[Interval]) -> str:
    """A gain with its ends in points; of several their range."""
    if len(gains) == 1:
        return formats.difference(gains[0])
    return " to ".join(dict.fromkeys(formats.signed(way(gain.value for gain in gains)) for way in (min, max)))


def _range(fractions: Iterable[float]) -> str:
    """The lowest and the highest in points: `0.09 to 0.23`; one number where they look the same."""
    known = list(fractions)
    return " to ".join(dict.fromkeys(formats.points(way(known)) for way in (min, max)))


def _label(size: Size) -> str:
    """`8 batches (128 images)`, `all 898 images`."""
    if size.batches is None:
        return "all images" if size.images is None else f"all {size.images:,.0f} images"
    number = "" if size.images is None else f" ({size.images:,.0f} images)"
    return f"{size.batches} batch{'es' if size.batches != 1 else ''}{number}"


def _undecided(alike: Sequence[CalibrationSizes]) -> str:
    if all(len(size.accuracies) == 1 for size in alike[0].sizes):
        return (
            "with one sample of calibration images a size, what the size does can't be told apart from what the "
            "sample does; calib.sampling=random calib.seed=0,1,2 would."
        )
    means = [[fmean(size.accuracies) for size in one.sizes] for one in alike]
    return (
        "the samples of a size don't differ on these test images, so there is no spread to hold the sizes against; "
        f"their mean accuracies lie within {_range(max(each) - min(each) for each in means)} points."
    )
