"""The sentences of a run beside its numbers: all that concerns this network on this CPU, and nothing idle or false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qexp import quantize
from qexp.accuracy import target_cpu
from qexp.config.schema import Config, Engine, FlowName, Overflow, Scheme
from qexp.metrics import Metric
from qexp.pipeline import analyse, prepare, run_metrics, warnings
from qexp.quantize import FLOWS, ReducedRange, Side
from qexp.quantize.saturation import kernels
from qexp.quantize.saturation.accumulators import LayerSaturation
from qexp.quantize.saturation.kernels import KernelSignature, Probe
from qexp.quantize.torch_backend import emulation
from qexp.quantize.torch_backend.slow_depthwise import without_fast_kernel
from qexp.records import AccuracySource, Layer, Predictions, SaturationStatus
from qexp.report import sentences
from qexp.runtimes import int8_kernels
from qexp.runtimes.parting import Parting
from tests.helpers.quantizable import Chain, images, settings, spec, trained

Composed = Callable[..., Config]
DENSE = (Layer("conv", "conv", True), Layer("fc", "linear", True))
MOBILE = (*DENSE, Layer("dw", "depthwise", True))


def signature(dense: int, fbgemm_depthwise: int = 112) -> KernelSignature:
    """A CPU whose dense kernels all answer `dense` where 200 is exact; oneDNN's depthwise kernels always are."""

    def answer(engine: Engine, kind: str) -> int:
        if engine is Engine.qnnpack or (engine is Engine.onednn and kind == "depthwise_wide"):
            return 200
        return fbgemm_depthwise if kind == "depthwise_wide" else dense

    kinds = ("conv", "linear", "depthwise_wide")
    return KernelSignature(
        "made up", tuple(Probe(e, s, k, answer(e, k)) for e in Engine for s in Scheme for k in kinds)
    )


VNNI, AVX2 = signature(200), signature(101)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelSignature], None]:
    return lambda cpu: monkeypatch.setattr(kernels, "probe", lambda: cpu)


def predicted(count: int, right: int) -> Predictions:
    logits = np.stack([np.arange(count) < right, np.arange(count) >= right], 1).astype(np.float32)
    return Predictions(logits, np.zeros(count, np.int64), tuple(map(str, range(count))))


def answered(
    *rows: LayerSaturation, source: AccuracySource = AccuracySource.executed, exact: int = 88
) -> target_cpu.TargetAccuracy:
    """The accuracy on a target of 100 images, of which 80 are right with the sums that are executed."""
    every, executed = np.arange(100), predicted(100, 80)
    seen = SaturationStatus.observed if any(row.saturates for row in rows) else SaturationStatus.possible
    return target_cpu.TargetAccuracy(source, every, executed, seen, every, predicted(100, exact), executed, rows)


def row(name: str, different: int, highest: int = 255) -> LayerSaturation:
    return LayerSaturation(name, "conv", 100, different, 9 * bool(different), highest)


def narrowed(*names: str, side: Side = Side.weights) -> tuple[ReducedRange, ...]:
    return tuple(ReducedRange(name, side, 0.1, 0.2) for name in names)


def test_the_guard_is_explained_where_it_concerns_the_network(composed: Composed, on: Callable[..., None]) -> None:
    def why(config: Config, *given: object) -> str:
        return prepare.why_guarded(config, prepare.resolved(config).overflow, *given)  # type: ignore[arg-type]

    on(VNNI)
    assert why(composed(), DENSE, ()) == ""
    depthwise = "16-bit sums of depthwise layers of engine=x86 can saturate on this CPU"
    assert depthwise in why(composed(), MOBILE, narrowed("dw"))
    assert why(composed(), MOBILE, narrowed("dw")).endswith("they do in 1 layers, which got 7 bits")
    assert why(composed(), MOBILE, ()).endswith("they do in none, so all keep their bits")
    assert "engine=onednn don't saturate on this CPU" in why(composed("engine=onednn"), MOBILE, ())
    assert "with 7 bits or fewer" in why(composed("qconfig.activation.bits=6"), MOBILE, ())
    assert why(composed("qconfig.overflow=layers"), MOBILE, narrowed("dw")) == ""
    assert why(composed("flow=dynamic"), MOBILE, ()) == ""
    on(AVX2)
    assert "16-bit sums of engine=x86 can saturate on this CPU" in why(composed(), DENSE, ())


def test_numbers_on_saturation_are_of_layers_that_saturate() -> None:
    fp32 = predicted(100, 90)
    none = run_metrics.target_metrics(fp32, answered(row("conv", 0), exact=81), 0.005)
    assert none[Metric.saturation_layers] == 0
    assert none[Metric.exact_accuracy] == 0.81
    exact = {Metric.exact_accuracy, Metric.exact_images, Metric.saturation_layers}
    assert {name for name in none if name.startswith("saturation/")} == exact
    some = run_metrics.target_metrics(fp32, answered(row("conv", 3)), 0.005)
    assert some[Metric.saturation_loss] == pytest.approx(0.08)
    assert some[Metric.saturation_agreement] == pytest.approx(0.92)
    assert Metric.saturation_sqnr in some


def said(config: Config, layers: tuple[Layer, ...], *given: object, answer: target_cpu.TargetAccuracy) -> list[str]:
    guard, executing = prepare.resolved(config).overflow, int8_kernels.of(config, config.runtimes[0])
    found = warnings.saturation_warnings(config, guard, layers, given, answer, executing)  # type: ignore[arg-type]
    return [sentences.warning(one) for one in found]


def test_that_layers_were_narrowed_is_said_with_what_needs_no_guard(
    composed: Composed, on: Callable[..., None]
) -> None:
    quiet = answered(row("dw", 0, 127))
    on(VNNI)
    (sentence,) = said(composed(), MOBILE, *narrowed("dw"), answer=quiet)
    assert sentence.startswith("the weights of 1 of 3 INT8 layers have 7 bits")
    assert "engine=onednn needs that for none of them" in sentence
    # It takes no such weights.
    (sentence,) = said(composed("qconfig.weight.scheme=asymmetric"), MOBILE, *narrowed("dw"), answer=quiet)
    assert "onednn" not in sentence
    on(AVX2)  # where oneDNN's dense kernels saturate too
    both = (*narrowed("conv", "fc"), *narrowed("dw", side=Side.activations))
    (sentence,) = said(composed(), MOBILE, *both, answer=quiet)
    assert sentence.startswith("the weights of 2 and the activations of 1 of 3 INT8 layers have 7 bits")
    assert "onednn" not in sentence
    assert said(composed(), DENSE, answer=quiet) == []


def test_what_saturates_in_spite_of_a_guard_is_said(composed: Composed, on: Callable[..., None]) -> None:
    on(AVX2)
    config = composed("qconfig.overflow=activations")
    assert said(config, DENSE, answer=answered(row("conv", 0, 190))) == []
    (sentence,) = said(config, DENSE, answer=answered(row("conv", 3, 190), row("fc", 0, 255)))
    assert sentence == (
        "16-bit sums saturate in 1 layers (conv) in spite of qconfig.overflow=activations, which goes by calibration "
        "images, where activations went up to code 190; qconfig.overflow=weights avoids it."
    )
    fp32, answer = predicted(100, 90), answered(row("conv", 3))
    assert run_metrics.verdict(fp32, answer, 0.005, Overflow.layers).remedy == "qconfig.overflow=weights"
    assert run_metrics.verdict(fp32, answer, 0.005).remedy == "qconfig.overflow=auto"


def test_what_can_saturate_without_a_guard_has_a_warning(composed: Composed, on: Callable[..., None]) -> None:
    config, seen = composed("qconfig.overflow=none"), answered(row("conv", 3))
    on(AVX2)
    (sentence,) = said(config, DENSE, answer=seen)
    assert "16-bit sums saturate" in sentence
    assert "qconfig.overflow=auto avoids it" in sentence
    assert said(config, DENSE, answer=replace(seen, saturation=SaturationStatus.impossible)) == []
    # auto is what was asked for, and the target's accuracy is another.
    assert said(composed("target=vnni"), DENSE, answer=answered(row("conv", 3), source=AccuracySource.exact)) == []
    on(VNNI)
    assert said(config, DENSE, answer=answered(row("conv", 0))) == []
    (sentence,) = said(config, MOBILE, answer=answered(row("dw", 0)))
    assert "16-bit sums can saturate" in sentence
    assert "qconfig.overflow=auto or engine=onednn avoids it" in sentence


# What FBGEMM's takeDepthWiseFastPath (Fbgemm.h) wants, and what it doesn't take.
FAST = {
    "3x3": nn.Conv2d(104, 104, 3, padding=1, groups=104),
    "5x5/2": nn.Conv2d(104, 104, 5, 2, padding=2, groups=104),
    "7x7": nn.Conv2d(104, 104, 7, padding=3, groups=104),
    "dense": nn.Conv2d(104, 104, 3),
    "grouped": nn.Conv2d(104, 104, 3, groups=26),
}
SLOW = {
    "unpadded": nn.Conv2d(104, 104, 3, groups=104),
    "dilated": nn.Conv2d(104, 104, 3, padding=2, dilation=2, groups=104),
    "9x9": nn.Conv2d(104, 104, 9, padding=4, groups=104),
    "stride 3": nn.Conv2d(104, 104, 3, 3, padding=1, groups=104),
    "few": nn.Conv2d(104, 92, 1),
    "92 channels": nn.Conv2d(92, 92, 3, padding=1, groups=92),
    "more": nn.Conv2d(92, 108, 1),
    "108 channels": nn.Conv2d(108, 108, 3, padding=1, groups=108),
}


def test_depthwise_convolutions_without_a_fast_kernel_are_named(composed: Composed) -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 104, 1), *FAST.values(), *SLOW.values()))
    example = images(2, size=32)
    prepared = FLOWS[FlowName.fx].prepare(FLOWS[FlowName.fx].fuse(net, spec(), example), spec(), example)
    quantize.calibrate(prepared, [example])
    int8 = FLOWS[FlowName.fx].convert(prepared).module
    names = {f"{1 + i}": name for i, name in enumerate([*FAST, *SLOW])}

    def slow(engine: Engine, vnni: bool) -> list[str]:
        return [names[name] for name in without_fast_kernel(int8, engine, vnni)]

    alone = [name for name in SLOW if name not in ("few", "more")]
    assert slow(Engine.fbgemm, True) == slow(Engine.fbgemm, False) == slow(Engine.x86, False) == alone
    assert slow(Engine.x86, True) == [name for name in alone if name != "92 channels"]  # oneDNN's, up to 100 groups
    assert slow(Engine.onednn, False) == slow(Engine.qnnpack, True) == []

    (warning,) = warnings.slow_kernel_warnings(composed(), without_fast_kernel(int8, Engine.x86, True))
    sentence = sentences.warning(warning)
    assert "takes for 5 depthwise convolutions (6, 7, 8, ...)" in sentence
    assert "engine=onednn has one" in sentence
    assert list(warnings.slow_kernel_warnings(composed(), ())) == []


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_the_largest_code_that_a_layer_got_is_kept(flow: FlowName) -> None:
    net, seen, wider = trained(Chain()), images(8), images(8, seed=1) * 1.5
    fused = FLOWS[flow].fuse(net, spec(), seen)
    prepared = FLOWS[flow].prepare(fused, spec(settings(overflow="activations")), seen)
    quantize.calibrate(prepared, [seen])
    int8, exact = FLOWS[flow].convert(prepared).module, quantize.exact(prepared)
    got: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda m, given: got.update({name: int(given[0].int_repr().max())}))

    for name, module in exact.named_modules():
        if (public := name.removeprefix("module.")) in ("features.0", "features.3", "features.6", "fc"):
            watch(public, module)
    rows = emulation.layer_by_layer(int8, exact, [wider], Engine.x86)
    assert got["features.0"] > 127  # beyond what the guard's scale maps its range to
    with torch.inference_mode():
        for one in rows:
            if emulation.can_overflow(
                int8.get_submodule(one.name if flow is FlowName.fx else f"module.{one.name}"), Engine.x86
            ):
                assert one.highest == got[one.name]
            else:
                assert one.highest == 0
    assert any(one.highest for one in rows)


@pytest.mark.parametrize(("guard", "bits", "expected"), [
    ("none", 8, 8), ("activations", 8, 7), ("activations", 7, 7), ("activations", 4, 4), ("layers", 8, 8)
])  # fmt: skip
def test_the_bits_of_activations_are_those_that_are_executed(
    composed: Composed, guard: str, bits: int, expected: int
) -> None:
    config = composed(f"qconfig.overflow={guard}", f"qconfig.activation.bits={bits}")
    some = narrowed("conv", side=Side.activations) if guard == "layers" else ()
    resolved = analyse.resolved_params(config.qconfig, config, some)
    assert resolved == {
        "resolved.overflow": guard,
        "resolved.weight_bits": "8",
        "resolved.activation_bits": str(expected),
        "resolved.activation_highest_code": str(2**bits - 1),
        "resolved.narrowed_weights": "0",
        "resolved.narrowed_activations": str(len(some)),
        "resolved.placement": "every_op",
    }
    qconfig = settings(activation_bits=bits, overflow=guard)
    fused = FLOWS[FlowName.fx].fuse(trained(Chain()), spec(), images(2))
    prepared = FLOWS[FlowName.fx].prepare(fused, spec(qconfig), images(2))
    quantize.calibrate(prepared, [images(8)])
    # And they are: beyond what calibration saw, codes go on to the end that is told.
    int8, seen = FLOWS[FlowName.fx].convert(prepared).module, list[int]()
    int8.get_submodule("features.0").register_forward_hook(
        lambda m, given, output: seen.append(output.int_repr().max())
    )
    with quantize.engine(Engine.x86), torch.inference_mode():
        int8(images(8) * 9)
    assert seen == [2**bits - 1]


def test_kernels_of_other_libraries_are_asked_themselves(
    composed: Composed, on: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = dict.fromkeys(kernels.probed_layers(), 200)
    codes = {"onnxruntime": exact | {"conv": 101, "linear": 101}, "openvino": exact}
    monkeypatch.setattr(int8_kernels, "probe", lambda name: codes[name])
    on(VNNI)  # of torch's kernels, whatever this CPU does
    both = "runtimes=[onnxruntime,openvino,eager]"
    assert prepare.resolved(composed("runtimes=[eager]", "engine=onednn")).overflow is Overflow.none
    assert prepare.resolved(composed(both, "engine=onednn")).overflow is Overflow.layers
    assert prepare.resolved(composed(both, "engine=onednn", "target=vnni")).overflow is Overflow.none
    assert prepare.resolved(composed(both, "engine=qnnpack", "target=avx2")).overflow is Overflow.layers
    assert prepare.resolved(composed(both, "flow=dynamic")).overflow is Overflow.none
    config = composed(both, "engine=onednn")
    why = prepare.why_guarded(config, Overflow.layers, DENSE, narrowed("conv"))
    assert "16-bit sums of onnxruntime can saturate on this CPU" in why
    (sentence,) = said(composed(both, "qconfig.overflow=none", "engine=onednn"), DENSE, answer=answered(row("conv", 3)))
    assert "16-bit sums saturate in the kernels of onnxruntime" in sentence
    assert "or engine=onednn" not in sentence

    def blamed(guard: Overflow, *layers: Layer) -> list[str]:
        parted = [Parting(runtime, 3.0, "conv", 2.0) for runtime in ("onnxruntime", "openvino")]
        return [sentences.warning(one) for one in warnings.parting_warnings(config, guard, layers, parted)]

    theirs, exact = blamed(Overflow.none, *MOBILE)
    assert "its 16-bit sums of conv and linear layers saturate on this CPU" in theirs
    assert "qconfig.overflow=weights" in theirs
    assert "saturate" not in exact
    assert not [one for one in blamed(Overflow.weights, *MOBILE) if "saturate" in one]
    assert not [one for one in blamed(Overflow.none, MOBILE[-1]) if "saturate" in one]


def test_a_runtime_with_fewer_layers_in_int8_says_so() -> None:
    (found,) = warnings.runtime_layer_warnings(DENSE, {"onnxruntime": (2, 0), "openvino": (1, 1)})
    assert sentences.warning(found) == "openvino executes 1 of the 2 INT8 layers in INT8."
