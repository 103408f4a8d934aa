"""Silence around libraries that report what their callers know."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """In this context no warnings are shown, and these loggers write errors alone."""
    named = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in named]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in named:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(named, before, strict=True):
                logger.setLevel(level)
