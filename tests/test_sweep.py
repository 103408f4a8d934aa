"""What a sweep's owner decides by itself: names, quoting, sentences that are said once, signals."""

from __future__ import annotations

import logging
import os
import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp import sweep


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("qconfig=per_channel", "per_channel"),
        ("calib.batches=32", "batches=32"),
        ("calib.batches=null", "batches=null"),
        ("fusion=true", "fusion=true"),
        ("model.checkpoint='/a/b c/net.pt'", "net.pt"),
        ("+model.width=8", "width=8"),
        ("train.lr=0.01", "lr=0.01"),
    ],
)
def test_a_job_is_named_by_what_it_overrides(override: str, name: str) -> None:
    assert sweep.short(override) == name


@pytest.mark.parametrize("text", ["per_channel 32", "it's", "x=1, [2] {3: 4}", "é {oc}"])
def test_a_quoted_name_is_read_back_by_hydra_as_it_was(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"tracking.name={sweep.quoted(text)}"])
    assert str(override.value()) == text


def test_what_all_jobs_say_is_let_through_once_and_warnings_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.Once, "said", set())

    def passes(level: int, text: str) -> bool:
        return sweep.Once().filter(logging.LogRecord("qexp", level, "", 0, text, (), None))

    assert [passes(logging.INFO, "a"), passes(logging.INFO, "a"), passes(logging.INFO, "b")] == [True, False, True]
    assert [passes(logging.WARNING, "w"), passes(logging.WARNING, "w")] == [True, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_one_stop_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def stopped() -> None:
        with sweep.stoppable():
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 5)

    with pytest.raises(sweep.Stop) as caught:
        stopped()
    assert caught.value.code == 128 + number
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


@pytest.mark.parametrize("swallowed", [True, False])
def test_a_stop_that_other_code_swallows_or_replaces_is_still_a_stop(swallowed: bool) -> None:
    """As OmegaConf does, whose clean-up fails on a half-made node when the signal hits a composition."""

    def stopped() -> None:
        with sweep.stoppable(), sweep.stoppable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.sigtimedwait([], 5)
            except BaseException as error:
                if not swallowed:
                    raise AttributeError("clean-up failed") from error

    with pytest.raises(sweep.Stop):
        stopped()
