"""Sentences for verdicts and warnings, which are plain values until they are printed or saved."""

from __future__ import annotations

from collections.abc import Sequence

from qexp.records import RunWarning, Verdict, VerdictKind, WarningCode


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
    return f"{100 * found.margin:g} points"


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
                f"engine={data['engine']}, and the guard is off: this accuracy holds for this CPU only; "
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
