"""When a job of a sweep may do what, so that the next one is prepared while it evaluates. No torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Turn:
    """A job among those of its sweep; by itself, it may do anything at any time.

    sweep: the identity of the sweep; empty for a job by itself.
    evaluating: held while all evaluation images are gone through and models are timed; one job of a sweep holds it at a
        time, and the next one waits for it when it is prepared.
    share: called when the turn to evaluate has come; from then on the next job may be prepared.
    alone: called before something is timed, while `evaluating` is held; returns when the job before has ended in all
        respects, and the next one waits.
    """

    sweep: str = ""
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    share: Callable[[], None] = _nothing
    alone: Callable[[], None] = _nothing
