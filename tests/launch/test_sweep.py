"""A sweep's names, messages that are logged once, signals, and summary."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from qexp.launch import job_process, planning, progress, signals, sweep, tracked_run
from qexp.launch.job import Job
from qexp.records import Result, Verdict, VerdictKind


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
    assert planning.short(override) == name


def test_no_two_jobs_have_one_name() -> None:
    telling = [["model.checkpoint=/a/net.pt"], ["model.checkpoint=/b/net.pt"], ["model.checkpoint=/b/other.pt"]]
    assert planning.names(telling) == ["model.checkpoint=/a/net.pt", "model.checkpoint=/b/net.pt", "other.pt"]


def test_the_only_job_of_a_sweep_is_named_by_what_its_result_depends_on() -> None:
    given = ["qconfig=per_channel", "outputs=/tmp/out", "resume=false", "report.auto=false", "calib.batches=32"]
    assert planning.of_result(given) == ["qconfig=per_channel", "calib.batches=32"]
    assert planning.of_result(["outputs=/tmp/out"]) == ["outputs=/tmp/out"]


@pytest.mark.parametrize(
    ("flow", "typed", "expected"),
    [("pt2e", [], True), ("fx", ["calib=small,large"], False), ("eager", ["flow=fx,pt2e"], True),
     ("pt2e", ["flow=eager,fx"], False)],
)  # fmt: skip
def test_a_sweep_knows_before_its_jobs_whether_pt2e_is_among_their_flows(
    flow: str, typed: list[str], expected: bool
) -> None:
    assert planning.may_be_pt2e(OmegaConf.create({"flow": flow}), typed) is expected


def test_what_all_jobs_say_is_let_through_once_and_warnings_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Once, "said", set())

    def passes(level: int, text: str) -> bool:
        return progress.Once().filter(logging.LogRecord("qexp", level, "", 0, text, (), None))

    assert [passes(logging.INFO, "a"), passes(logging.INFO, "a"), passes(logging.INFO, "b")] == [True, False, True]
    assert [passes(logging.WARNING, "w"), passes(logging.WARNING, "w")] == [True, True]


STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def sighup_as_in_a_terminal() -> Iterator[None]:
    """Don't ignore SIGHUP, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_becomes_one_stop_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOPPING]

    def stopped() -> None:
        with signals.stoppable():
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 5)

    with pytest.raises(signals.Stop) as caught:
        stopped()
    assert caught.value.code == 128 + number
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_sighup_that_was_ignored_still_is() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def hit(number: signal.Signals, then: str) -> None:
    """Send a signal within code that raises it, swallows it, or replaces it by another error, as OmegaConf does."""
    try:
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 5)
    except BaseException as error:
        if then == "raise":
            raise
        if then == "replace":
            raise AttributeError("clean-up failed") from error


AFTERWARDS = ["raise", "replace", "swallow"]


@pytest.mark.parametrize("then", AFTERWARDS)
def test_a_stop_that_other_code_swallows_or_replaces_is_still_a_stop(then: str) -> None:
    def stopped() -> None:
        with signals.stoppable(), signals.stoppable():
            hit(signal.SIGTERM, then)

    with pytest.raises(signals.Stop):
        stopped()
    with signals.stoppable():
        pass  # the stop was of the contexts before


@pytest.mark.parametrize("then", AFTERWARDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_ends_a_single_run_and_a_planned_sweep_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, then: str
) -> None:
    single: Any = SimpleNamespace(config=SimpleNamespace(sweep=None), alone=True)
    monkeypatch.setattr(tracked_run, "run_single", lambda job: hit(number, then))
    monkeypatch.setattr(sweep, "exclude_from_dirname", lambda master: None)
    monkeypatch.setattr(sweep, "may_be_pt2e", lambda master, overrides: False)
    monkeypatch.setattr(sweep, "plan", lambda *arguments: hit(number, then))
    monkeypatch.setattr(sweep, "launch", lambda *arguments: pytest.fail("went on after the stop"))
    nothing: Any = None
    ways: list[Callable[[], object]] = [lambda: tracked_run.run(single)]
    if then != "swallow":  # a plan that goes on as if nothing had been is stopped when the sweep is left
        ways.append(lambda: sweep.run_sweep(nothing, [], [], nothing, nothing, None))
    for way in ways:
        with pytest.raises(SystemExit) as ended:
            way()
        assert ended.value.code == code
        said = capsys.readouterr().err
        assert said.startswith(f"Stopped by {number.name}. To run it again:\n  python -m qexp")


def test_the_second_signal_leaves_at_once() -> None:
    code = """
import os, signal
from qexp.launch import signals
with signals.stoppable():
    try:
        with signals.stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 5)
        print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("first", STOPPING)
def test_the_end_of_the_terminal_is_no_second_signal(first: signal.Signals) -> None:
    def stopped() -> None:
        with signals.stoppable():
            try:
                os.kill(os.getpid(), first)
                signal.sigtimedwait([], 5)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)
                closed.append(True)

    closed: list[bool] = []
    with pytest.raises(signals.Stop) as caught:
        stopped()
    assert caught.value.code == 128 + first
    assert closed == [True]


def test_after_a_swallowed_stop_nothing_else_is_started() -> None:
    def stopped() -> None:
        with signals.stoppable():
            hit(signal.SIGTERM, "swallow")
            with signals.stoppable():
                pytest.fail("went on after the stop")

    with pytest.raises(signals.Stop):
        stopped()


def test_what_hydra_composed_is_kept_of_a_job(
    composed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's files are logged even where the job's result does not list them."""
    folder = tmp_path / "job"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    verdict = Verdict(VerdictKind.loss, 0.1, 9)
    result = Result(
        metrics={}, resolved={}, tags={}, verdict=verdict, warnings=(), files={"model": str(folder)}, datasets=(),
        flavor={},
    )  # fmt: skip
    monkeypatch.setattr(job_process, "start", lambda config, folder: SimpleNamespace(end=lambda: None))
    choices = {"dataset": "digits", "model": "tiny"}
    job = Job(composed(), choices, {}, folder, tmp_path, 0, False, folder / ".hydra")
    run = tracked_run.track(job)
    next(run)
    with pytest.raises(StopIteration) as ended:
        run.send(result)
    row, handle = ended.value.value
    assert row.status == "FINISHED"
    assert "hydra" in [file.path for file in handle.store.client.list_artifacts(handle.id)]
    kept = handle.store.client.download_artifacts(handle.id, "hydra/overrides.yaml")
    assert Path(kept).read_text() == "- seed=1\n"
