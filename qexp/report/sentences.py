"""Sentences for verdicts, warnings and recommendations, which are plain values until they are printed or saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qexp.config.identity import NOT_APPLICABLE
from qexp.config.schema import ReportObjective
from qexp.metrics import Metric
from qexp.records import Interval, RunWarning, Verdict, VerdictKind, WarningCode
from qexp.report import formats

if TYPE_CHECKING:
    from qexp.report.decision import Candidate, Recommendation  # which import scipy

# A sentence names so many candidates; more are counted.
NAMED = 2


def verdict(found: Verdict) -> str:
    """A verdict in full: `can't tell with 899 images; 3,400 would do`, with its cause where one is known."""
    needed = "" if found.images_needed is None else f"{found.images_needed:,} would do"
    return "; ".join(part for part in (conclusion(found), needed, cause(found)) if part)


def conclusion(found: Verdict) -> str:
    """A verdict without advice: `no loss beyond 0.5 points`."""
    if found.kind is VerdictKind.no_loss:
        return f"no loss beyond {_margin(found)}"
    return "loss" if found.kind is VerdictKind.loss else f"can't tell with {found.images:,} images"


def short(found: Verdict) -> str:
    """A verdict for a column: `no loss > 0.5`, `loss`, `can't tell (24,000)`."""
    if found.kind is VerdictKind.no_loss:
        return f"no loss > {100 * found.margin:g}"
    return "loss" if found.kind is VerdictKind.loss else f"can't tell ({found.images_needed:,})"


def explained(found: Verdict) -> str:
    """The meaning of `short`, for a legend; empty for a loss."""
    if found.kind is VerdictKind.no_loss:
        return f"{short(found)}: none beyond {_margin(found)}, at 95%"
    return "" if found.kind is VerdictKind.loss else f"{short(found)}: {found.images_needed:,} test images would do"


def cause(found: Verdict) -> str:
    """The cause of a loss and what avoids it; empty where none is known."""
    if found.lost is None or found.lost_to_saturation is None:
        return ""
    part = "all of it" if found.saturation_only else f"{100 * found.lost_to_saturation:.1f} of them"
    return f"{100 * found.lost:.1f} points lost, {part} to 16-bit sums that saturate; {found.remedy} avoids it"


def _margin(found: Verdict) -> str:
    return _points(found.margin)


def warning(found: RunWarning) -> str:
    """A warning, with the settings that avoid its cause."""
    data = found.data
    match found.code:
        case WarningCode.data_set_for_trying:
            return f"digits, with {data['images']} images of 8x8 pixels, is for trying the tool and not for deciding."
        case WarningCode.one_model_a_thread:
            return (
                "two threads that call one dynamic model of engine=onednn at a time get wrong answers (a fault of "
                "torch): serve it with a model for each thread, or with engine=x86."
            )
        case WarningCode.timing_untrusted:
            return "the timing can't be trusted (the tag latency_reason says why): repeat it on a quiet machine."
        case WarningCode.int8_slower:
            return f"INT8 is slower than FP32 with flow={data['flow']} engine={data['engine']} on this CPU."
        case WarningCode.int8_not_faster:
            return "INT8 and FP32 are as fast as each other, as far as the noise lets one tell."
        case WarningCode.simulated:
            return (
                f"Weights of {data['weights']} and activations of {data['activations']} bits are simulated in float, "
                "since no kernels hold more than 8: this is their accuracy, and nothing that could ship."
            )
        case WarningCode.runtime_parted:
            saturates = (
                f"; a probe found that its 16-bit sums of {' and '.join(data['saturates'])} layers saturate on this "
                "CPU, which qconfig.overflow=weights avoids"
                if data["saturates"]
                else ""
            )
            return (
                f"INT8 in {data['runtime']} parts from torch's by {data['times']:.1f} times what quantization costs, "
                f"beginning with {data['layer']} (by {data['steps']:.1f} steps of its grid): don't ship it{saturates}."
            )
        case WarningCode.runtime_layers_in_fp32:
            return f"{data['runtime']} executes {data['executed']} of the {data['layers']} INT8 layers in INT8."
        case WarningCode.layers_in_fp32:
            reasons = f": {', '.join(data['reasons'])}" if data["reasons"] else ""
            return f"{len(data['layers'])} layers stay in FP32 ({_some(data['layers'])}){reasons}."
        case WarningCode.batchnorm_left:
            return f"{data['count']} BatchNorms were not folded into a convolution."
        case WarningCode.layers_narrowed:
            sides = sorted(data["sides"].items(), reverse=True)
            number = " and ".join(f"the {side} of {count}" for side, count in sides)
            other = "; engine=onednn needs that for none of them" if data["onednn"] else ""
            return (
                f"{number} of {data['layers']} INT8 layers have 7 bits, for their 16-bit sums saturate (layers.csv "
                f"names them){other}."
            )
        case WarningCode.saturates_in_spite_of_guard:
            beyond = "" if data["beyond"] is None else f", where activations went up to code {data['beyond']}"
            return (
                f"16-bit sums saturate in {len(data['layers'])} layers ({_some(data['layers'])}) in spite of "
                f"qconfig.overflow={data['guard']}, which goes by calibration images{beyond}; "
                f"{data['remedy']}{_or_onednn(data['onednn'])} avoids it."
            )
        case WarningCode.saturation_unguarded:
            return (
                f"16-bit sums {'saturate' if data['observed'] else 'can saturate'} in the kernels of "
                f"{data['kernels']}, and the guard is off: this accuracy holds for this CPU only; "
                f"qconfig.overflow=auto{_or_onednn(data['onednn'])} avoids it."
            )
        case WarningCode.slow_depthwise:
            other = ", where engine=onednn has one" if data["onednn"] else ""
            return (
                f"FBGEMM, which engine={data['engine']} takes for {len(data['layers'])} depthwise convolutions "
                f"({_some(data['layers'])}), has no fast kernel for them (it wants channels in eights, a window of 3, "
                "5 or 7 with its padding of half of it, and stride 1 or 2): they take tens to a thousand times as "
                f"long{other}."
            )


def _or_onednn(onednn: bool) -> str:
    return " or engine=onednn" if onednn else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---- Recommendations


def recommendation(found: Recommendation) -> tuple[str, str]:
    """The recommendation with its evidence, and the qualifications to it, a sentence each."""
    from qexp.report.decision import Answer

    match found.kind:
        case Answer.ship:
            return _ships(found), _beside(found)
        case Answer.stay_on_fp32:
            return f"Stay on FP32: {', and '.join(found.reasons)}.", _most_accurate(found)
        case Answer.speed_unknown:
            return f"How fast INT8 is can't be said: {_first(found)}.", _qualified(found)
    return f"Can't tell{_with_images(found)}: {_first(found)}.", _provisional(found)


def setting(values: Mapping[str, str]) -> str:
    """A setting in short, for those who know which settings varied: `per_channel, mse, 8 batches, overflow=none`."""
    return ", ".join(_value(name, text) for name, text in values.items() if text != NOT_APPLICABLE) or "INT8"


def _value(name: str, text: str) -> str:
    if name == "calib.batches":
        return "all calibration images" if text == "null" else f"{text} batch{'es' * (text != '1')}"
    if name in ("qconfig", "observer", "flow", "engine"):
        return text.removesuffix("*")
    return f"{name.removeprefix('qconfig.')}={text}"


def candidate(one: Candidate) -> str:
    """A candidate and the run that ships: `per_channel, mse in torchscript (run NAME)`."""
    return f"{setting(one.setting)} in {one.runtime} (run {one.ships.name})"


def _ships(found: Recommendation) -> str:
    one = found.chosen
    assert one is not None
    lead = f"Ship {candidate(one)}:"
    if found.objective is ReportObjective.accurate:
        within = f"nothing within {found.max_ms:g} ms is shown to be more accurate"
        return f"{lead} {within}; {_speed(one, ms=True)}, {_accuracy(one)}."
    gain = _size(one) if found.objective is ReportObjective.smallest else _speed(one)
    return f"{lead} {gain}, {_accuracy(one)}, shown to lose less than {_points(found.margin)} ({_test(found)})."


def _test(found: Recommendation) -> str:
    """The p-value of the chosen candidate, and how it was found: `p = 0.003 after Holm over 48 candidates`."""
    assert found.chosen is not None
    p = f"p {'< 0.0001' if found.chosen.adjusted < 1e-4 else f'= {found.chosen.adjusted:.2g}'}"
    if found.chosen_by:
        return f"{p}, tested once on {found.images:,} images after it was chosen on {found.chosen_by:,} others"
    number = len(found.candidates)
    return f"{p} after Holm over {number} candidates" if number > 1 else p


def _speed(one: Candidate, ms: bool = False) -> str:
    """`5.30× [5.10, 5.40] as fast as the fastest FP32`; with ms, the latency before it."""
    if one.latency is None:
        return "not timed"
    found, text = one.latency.speedup, Metric.speedup.text
    said = f"{text(found.value)}× [{text(found.low)}, {text(found.high)}] as fast as the fastest FP32"
    if not one.latency.valid:
        said += ", by a timing that can't be trusted"
    return f"{Metric.latency_int8.text(one.latency.ms)} ms, {said}" if ms else said


def _size(one: Candidate) -> str:
    """`11.31 MB, where FP32 has 44.80 MB`."""
    if one.size_mb is None:
        return "of unknown size"
    fp32 = one.ships.metrics.get(Metric.size_fp32)
    beside = "" if fp32 is None else f", where FP32 has {Metric.size_fp32.text(fp32)} MB"
    return f"{Metric.size_int8.text(one.size_mb)} MB{beside}"


def _accuracy(one: Candidate) -> str:
    """`accuracy -0.12 points [-0.40, +0.15]`, of INT8 against FP32."""
    return "of unknown accuracy" if one.delta is None else f"accuracy {_interval(one.delta)}"


def _interval(delta: Interval) -> str:
    return f"{formats.signed(delta.value)} points [{formats.signed(delta.low)}, {formats.signed(delta.high)}]"


def _beside(found: Recommendation) -> str:
    """The candidates tied with the chosen one, and the spread of its calibration seeds."""
    one = found.chosen
    assert one is not None
    left_out = {id(each) for each in found.dropped}
    others = [each for each in found.tied if each is not one and id(each) not in left_out]
    alike = {
        ReportObjective.fastest: "as fast, as far as can be told,",
        ReportObjective.smallest: "as small",
        ReportObjective.accurate: "as accurate, as far as can be told,",
    }[found.objective]
    better = "fastest" if found.objective is ReportObjective.accurate else "simplest"
    if others:
        said = f"{_listed(others)} {_are(others)} {alike} and this is the {better} of them"
    else:
        said = f"No other candidate that qualifies is {alike.split(',')[0]}"
    if found.dropped:
        said += f"; {len(found.dropped)} more {_are(found.dropped)} shown to be less accurate"
    return f"{said}{_seeds(one)}."


def _are(some: Sequence[object]) -> str:
    return "is" if len(some) == 1 else "are"


def _listed(some: Sequence[Candidate]) -> str:
    if len(some) > NAMED:
        return f"{len(some)} other candidates"
    names = [f"{setting(one.setting)} in {one.runtime}" for one in some]
    return names[0] if len(names) == 1 else f"{'; '.join(names[:-1])} and {names[-1]}"


def _seeds(one: Candidate) -> str:
    """The spread over calibration seeds, as a clause; empty for a single one."""
    if len(one.deltas) < 2:
        return ""
    low, high, own = (formats.signed(value) for value in (min(one.deltas), max(one.deltas), one.deltas[0]))
    return (
        f"; accuracies are means over {len(one.deltas)} calibration seeds ({low} to {high} points), and the run is "
        f"that of the first ({own})"
    )


def _most_accurate(found: Recommendation) -> str:
    known = [one for one in found.candidates if one.delta]
    best = max(known, key=lambda one: one.delta.value if one.delta else 0.0, default=None)
    if best is None:
        return "No candidate has an accuracy."
    only = "The one candidate" if len(known) == 1 else "The most accurate candidate"
    return f"{only} is {candidate(best)}: {_accuracy(best)}, {_speed(best)}."


def _qualified(found: Recommendation) -> str:
    count, number, one = len(found.qualified), len(found.candidates), found.chosen
    assert one is not None
    some = "It is" if number == 1 else f"{count} of {number} candidates {'are' if count > 1 else 'is'}"
    settles = f"; to know, it would take {' and '.join(found.settles)}" if found.settles else ""
    which = ", the simplest of them" if count > 1 else ":"
    return f"{some} shown to lose less than {_points(found.margin)}{which} {candidate(one)}, {_accuracy(one)}{settles}."


def _first(found: Recommendation) -> str:
    return found.reasons[0] if found.reasons else "no candidate qualifies"


def _with_images(found: Recommendation) -> str:
    return f" with these {found.images:,} images" if found.images else ""


def _provisional(found: Recommendation) -> str:
    settles = f"it would take {' and '.join(found.settles)}" if found.settles else ""
    if found.chosen is None:
        return f"{settles[:1].upper()}{settles[1:]}." if settles else "There is nothing to recommend yet."
    gain = _size(found.chosen) if found.objective is ReportObjective.smallest else _speed(found.chosen)
    rest = f"; to know, {settles}" if settles else ""
    return f"Provisionally the best is {candidate(found.chosen)}: {gain}, {_accuracy(found.chosen)}{rest}."


def _points(fraction: float) -> str:
    return f"{100 * fraction:g} points"
