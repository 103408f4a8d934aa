"""torch's deprecation warnings, silenced where they are known.

torch.ao.quantization and TorchScript warn on every call that they are deprecated; torch's version is pinned. Only these
warnings are silenced, and only during such calls.
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
    """In this context, silence torch's warnings, by message, that its own functions are deprecated."""
    with warnings.catch_warnings():
        for message in _KNOWN:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def unprinted() -> Iterator[None]:
    """In this context, discard what is printed to stderr.

    torch prints a traceback for an error in a graph's code even if the error is caught.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def silence_first_warning() -> None:
    """Trigger torch's warning that quantized tensors are deprecated now, and silence it.

    torch warns once in a process, at the first quantized tensor, which would otherwise be in a user's INT8 model.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other")
        # By one thread: it would start others, for which a process forked later would wait (see `fork_preload`).
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        torch.set_num_threads(threads)
