"""What torch says of itself, and is kept from users.

torch.ao.quantization and TorchScript announce on every call that they are deprecated: known, and pinned. Nothing else
is silenced, and only while they are being called.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_KNOWN = (
    # typing_extensions.deprecated on prepare, convert, prepare_fx, convert_fx, quantize_dynamic
    r"torch\.ao\.quantization is deprecated and will be removed",
    # trace, freeze, save, load: a DeprecationWarning in torch 2.13, a FutureWarning from 2.14 on
    r"`torch\.jit\.\w+` is (deprecated|not supported)",
)


@contextmanager
def known_deprecations_silenced() -> Iterator[None]:
    """Silence, by message, what torch says about itself at each call of a deprecated function."""
    with warnings.catch_warnings():
        for message in _KNOWN:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def unprinted() -> Iterator[None]:
    """Keep what is printed to stderr from it: torch prints a traceback for an error in a graph's code, whoever catches
    that error."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def say_once_silently() -> None:
    """Let torch announce now, and unheard, that quantized tensors are deprecated: it does so once in a process, at
    whatever makes the first of them, which may be a user's INT8 model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other")
        # By one thread: it would start others, for which a process forked later would wait (see `fork_preload`).
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        torch.set_num_threads(threads)
