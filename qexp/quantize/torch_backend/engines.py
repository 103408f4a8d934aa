"""torch's quantized engine, a global setting: set in a context and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qexp.config.schema import Engine
from qexp.errors import InputError, RunError


def supported() -> tuple[Engine, ...]:
    """Return the engines of qexp that this build of torch supports."""
    return tuple(e for e in Engine if e.value in torch.backends.quantized.supported_engines)


@contextmanager
def engine(name: Engine) -> Iterator[None]:
    """In this context, set torch's quantized engine; restore the previous one afterwards.

    Raises InputError if this build of torch lacks it.
    """
    if name not in supported():
        raise InputError(f"engine={name.value} is not in this build of torch: choose one of {', '.join(supported())}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name.value
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def require(name: Engine) -> None:
    """Raise RunError unless torch's engine is `name`: a model packed for one engine runs wrongly under another,
    without an error from torch."""
    current = torch.backends.quantized.engine
    if current != name.value:
        raise RunError(f"this INT8 model was converted for engine={name.value}, but torch's engine is now {current}")
