"""Sentences that the reader of a run's numbers must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from qexp import quantize
from qexp.accuracy.target_cpu import Answer
from qexp.config.schema import Config, Engine, Flow, Overflow, Scheme, Target
from qexp.data.splits import Data
from qexp.metrics import Metric
from qexp.pipeline.metrics import instead_of
from qexp.quantize import Narrowed, supported
from qexp.quantize.saturation import kernels
from qexp.records import Layer, Saturation, Source


def of_sums(
    config: Config, guard: Overflow, layers: tuple[Layer, ...], narrowed: tuple[Narrowed, ...], answer: Answer
) -> Iterator[str]:
    """What the reader of the table must know of 16-bit sums, a sentence each. guard: what was executed, not auto."""
    saturating, signature = answer.saturating_layers, kernels.probe()
    of_kind = {layer.name: layer.kind for layer in layers if layer.int8}

    def or_onednn(names: Collection[str]) -> bool:
        """Whether these layers' sums are exact with engine=onednn, where it takes the weights."""
        kinds = kernels.overflowing_kinds(config.qconfig, Engine.onednn, config.flow, config.target, signature)
        takes = config.qconfig.weight.scheme is Scheme.symmetric and Engine.onednn in supported()
        return takes and not kinds & {of_kind[name] for name in names if name in of_kind}

    if narrowed:
        sides = Counter(str(one.side) for one in narrowed)
        number = " and ".join(f"the {side} of {count}" for side, count in sorted(sides.items(), reverse=True))
        other = "; engine=onednn needs that for none of them" if or_onednn([one.name for one in narrowed]) else ""
        yield (
            f"{number} of {len(of_kind)} INT8 layers have 7 bits, for their 16-bit sums saturate (layers.csv names "
            f"them){other}."
        )
    if guard is not Overflow.none and saturating:
        highest = max(layer.highest for layer in answer.layers if layer.saturates)
        other = " or engine=onednn" if or_onednn(saturating) else ""
        beyond = f", where activations went up to code {highest}" if highest > quantize.SAFE_CODE else ""
        yield (
            f"16-bit sums saturate in {len(saturating)} layers ({_some(saturating)}) in spite of qconfig.overflow="
            f"{guard}, which goes by calibration images{beyond}; {instead_of(guard)}{other} avoids it."
        )
    kinds = kernels.overflowing_kinds(config.qconfig, config.engine, config.flow, Target.native, signature)
    risky = [name for name, kind in of_kind.items() if kind in kinds]
    executed = answer.source is Source.executed and answer.saturation is not Saturation.impossible
    # What auto left alone it can't be recommended for: the model ships on another CPU then.
    if config.qconfig.overflow is Overflow.none and risky and executed:
        other = " or engine=onednn" if or_onednn(risky) else ""
        yield (
            f"16-bit sums {'saturate' if saturating else 'can saturate'} in the kernels of engine={config.engine}, and "
            f"the guard is off: this accuracy holds for this CPU only; qconfig.overflow=auto{other} avoids it."
        )


def of_slow_kernels(config: Config, slow: tuple[str, ...]) -> Iterator[str]:
    """That layers take long, in a sentence. slow: as of `depthwise.without_fast_kernel`."""
    if not slow:
        return
    other = (
        ", where engine=onednn has one"
        if config.qconfig.weight.scheme is Scheme.symmetric and Engine.onednn in supported()
        else ""
    )
    yield (
        f"FBGEMM, which engine={config.engine} takes for {len(slow)} depthwise convolutions ({_some(slow)}), has no "
        "fast kernel for them (it wants channels in eights, a window of 3, 5 or 7 with its padding of half of it, and "
        f"stride 1 or 2): they take tens to a thousand times as long{other}."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def doubts(config: Config, data: Data, layers: tuple[Layer, ...], found: Mapping[str, Any]) -> Iterator[str]:
    """What the reader of the table must know beside that of sums and kernels, a sentence each."""
    if config.dataset["_target_"] == "qexp.data.builtin.digits":
        yield f"digits, with {len(data.test)} images of 8x8 pixels, is for trying the tool and not for deciding."
    if config.flow is Flow.dynamic and config.engine is Engine.onednn:
        yield (
            "two threads that call one dynamic model of engine=onednn at a time get wrong answers (a fault of torch): "
            "serve it with a model for each thread, or with engine=x86."
        )
    if found.get("latency_valid") == "false":
        yield "the timing can't be trusted (the tag latency_reason says why): repeat it on a quiet machine."
    low, high = found.get(Metric.speedup_low), found.get(Metric.speedup_high)
    if low is not None and high is not None:
        if high < 1:
            yield f"INT8 is slower than FP32 with flow={config.flow} engine={config.engine} on this CPU."
        elif low <= 1:
            yield "INT8 and FP32 are as fast as each other, as far as the noise lets one tell."
    left = [layer for layer in layers if not layer.int8 and layer.kind != "batchnorm"]
    if left:
        reasons = ", ".join(dict.fromkeys(layer.reason for layer in left if layer.reason))
        named = _some([layer.name for layer in left])
        yield f"{len(left)} layers stay in FP32 ({named}){f': {reasons}' if reasons else ''}."
    norms = sum(layer.kind == "batchnorm" for layer in layers)
    if norms and config.flow is not Flow.dynamic:
        yield f"{norms} BatchNorms were not folded into a convolution."
