"""Warnings, and the sentences that verdicts and warnings are printed as."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from qexp.config.schema import Config
from qexp.metrics import Metric
from qexp.pipeline import warnings
from qexp.records import WARNING_TAG, Layer, RunRecord, Verdict, VerdictKind, WarningCode
from qexp.report import sentences

LAYERS = (
    Layer("conv", "conv", True),
    *(Layer(f"head.{number}", "linear", False, "left out") for number in range(4)),
    Layer("norm", "batchnorm", False),
)


def said(config: Config, layers: tuple[Layer, ...], **found: object) -> dict[WarningCode, str]:
    data = SimpleNamespace(test=range(899))
    names = {"low": Metric.speedup_low, "high": Metric.speedup_high}
    values = {names.get(name, name): value for name, value in found.items()}
    return {one.code: sentences.warning(one) for one in warnings.general_warnings(config, data, layers, values)}  # type: ignore[arg-type]


def test_what_the_reader_must_know_has_a_code_and_a_sentence(composed: Callable[..., Config]) -> None:
    assert said(composed(), LAYERS, latency_valid="false", low=0.7, high=0.9) == {
        WarningCode.data_set_for_trying: (
            "digits, with 899 images of 8x8 pixels, is for trying the tool and not for deciding."
        ),
        WarningCode.timing_untrusted: (
            "the timing can't be trusted (the tag latency_reason says why): repeat it on a quiet machine."
        ),
        WarningCode.layers_in_fp32: "4 layers stay in FP32 (head.0, head.1, head.2, ...): left out.",
        WarningCode.batchnorm_left: "1 BatchNorms were not folded into a convolution.",
    }
    dynamic = said(composed("flow=dynamic", "engine=onednn"), LAYERS[:1], low=0.9, high=1.1)
    assert set(dynamic) == {
        WarningCode.data_set_for_trying, WarningCode.one_model_a_thread, WarningCode.int8_not_faster
    }  # fmt: skip
    slower = said(composed(), LAYERS[:1], latency_valid="true", low=0.7, high=0.9)
    assert slower[WarningCode.int8_slower] == "INT8 is slower than FP32 with flow=fx engine=x86 on this CPU."
    assert set(said(composed(), LAYERS[:1], low=1.1, high=1.2)) == {WarningCode.data_set_for_trying}


def test_the_warnings_of_a_run_are_read_back_in_their_order() -> None:
    codes = (WarningCode.slow_depthwise, WarningCode.timing_untrusted)
    tags = {"latency_valid": "false", **{WARNING_TAG + code: f"{code}!" for code in codes}}
    assert list(RunRecord("a", "a", "FINISHED", tags=tags).warnings.items()) == [
        (WarningCode.timing_untrusted, "timing_untrusted!"),
        (WarningCode.slow_depthwise, "slow_depthwise!"),
    ]


def test_a_verdict_is_read_back_as_it_was() -> None:
    for verdict in (
        Verdict(VerdictKind.no_loss, 0.005, 899),
        Verdict(VerdictKind.undecided, 0.02, 899, 3400),
        Verdict(VerdictKind.loss, 0.005, 10_000, None, 1 / 3, 0.1, False, "qconfig.overflow=auto"),
        Verdict(VerdictKind.loss, 0.005, 10_000, None, 0.1, 0.1, True, "qconfig.overflow=weights"),
    ):
        assert RunRecord("a", "a", "FINISHED", tags=verdict.tags()).verdict == verdict
    assert verdict.tags()["verdict"] == "loss"
