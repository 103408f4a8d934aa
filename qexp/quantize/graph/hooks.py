"""Temporary hooks of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Attach hooks, from an iterable that registers them as it goes, and remove them at the end.

    with attached(layer.register_forward_hook(look) for layer in layers):
        model(images)
    """
    done: list[RemovableHandle] = []
    try:
        for handle in handles:
            done.append(handle)
        yield
    finally:
        for handle in done:
            handle.remove()
