"""Changes to Python and torch while a model is traced, for code that meets a symbolic value.

A symbolic value must pass for a tensor in a model's Python (`isinstance(x, Tensor)`), and must not in torch's C code,
which would read it as one and crash. C code also refuses sizes passed one by one if the first is symbolic, and `len`
must return a number.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

# Each with the position of its first size.
_TAKE_SIZES: tuple[tuple[Any, str, int], ...] = (
    *((torch, name, 0) for name in ("zeros", "ones", "empty", "rand", "randn", "full")),
    *(
        (Tensor, name, 1)
        for name in ("expand", "view", "reshape", "repeat", "tile", "new_zeros", "new_ones", "new_empty")
    ),
)


@contextmanager
def patched(symbolic: type[Any]) -> Iterator[None]:
    """In this context, let values of this class, which stand for their `concrete`, pass through a model's Python.

    The changes affect the whole process.
    """
    with ExitStack() as stack:
        stack.enter_context(_replaced(builtins, "isinstance", _isinstance(symbolic)))
        stack.enter_context(_replaced(builtins, "len", _len(symbolic)))
        for owner, name, position in _TAKE_SIZES:
            stack.enter_context(_replaced(owner, name, _with_sizes(getattr(owner, name), position, symbolic)))
        stack.enter_context(_replaced(Function, "apply", classmethod(_apply)))
        # It asks for the number of dimensions with an `if`, which subclasses that call BatchNorm's forward run into.
        stack.enter_context(_replaced(_BatchNorm, "_check_input_dim", lambda self, input: None))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _isinstance(symbolic: type[Any]) -> Callable[[Any, Any], bool]:
    python: Callable[[Any, Any], bool] = builtins.isinstance

    def look(value: Any, kinds: Any) -> bool:
        stands_for = type(value) is symbolic and "concrete" in value.__dict__
        return python(value, kinds) or (stands_for and python(value.concrete, kinds))

    return look


def _len(symbolic: type[Any]) -> Callable[[Any], Any]:
    python: Callable[[Any], int] = builtins.len

    def look(value: Any) -> Any:
        return value.size(0) if type(value) is symbolic and type(value.concrete) is Tensor else python(value)

    return look


def _with_sizes(function: Callable[..., Any], position: int, symbolic: type[Any]) -> Callable[..., Any]:
    """Wrap a function to get sizes as one tuple if any of them is symbolic."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sizes = args[position:]
        if len(sizes) and type(sizes[0]) not in (int, symbolic):
            sizes = tuple(sizes[0]) if isinstance(sizes[0], tuple | list) else ()
        if not any(type(size) is symbolic for size in sizes):
            return function(*args, **kwargs)
        one_by_one = type(args[position]) in (int, symbolic)
        return function(*args[:position], sizes, *(() if one_by_one else args[position + 1 :]), **kwargs)

    return call


class _Context:
    """Stands for the context that torch passes to an autograd.Function, which saves tensors for gradients in it."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Replace Function.apply: call a custom function's `forward`."""
    if cls.setup_context is Function.setup_context:
        return cls.forward(_Context(), *args, **kwargs)
    return cls.forward(*args, **kwargs)
