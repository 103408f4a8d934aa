"""A switch for those who look at a model's operators: a clamp of codes is one, whatever a kernel's fault needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plainly: ContextVar[bool] = ContextVar("_plainly", default=False)


def clamps_are_plain() -> bool:
    """True within `plain_clamps`."""
    return _plainly.get()


@contextmanager
def plain_clamps() -> Iterator[None]:
    """In this context a clamp is one operator with qnnpack too, where its values are wrong: to look at operators."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)
