"""torch.compile with freezing: FP32 only, compiled where it runs, for each batch size anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.errors import InputError
from qexp.runtimes import eager
from qexp.runtimes.base import Loaded

export = eager.export
"""What is saved is what the eager runtime saves: there is no compiled file."""


def load(path: Path, structure: nn.Module) -> Loaded:
    """As `eager.load`; the first call with each batch size compiles, for seconds."""
    module = eager.load(path, structure, None).module
    options: dict[str, Any] = {"freezing": True}
    return Loaded(torch.compile(module, options=options, dynamic=False), None)  # type: ignore[arg-type]


def check_compiler() -> None:
    """Raise InputError where there is no C++ compiler that torch.compile could use."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        named = os.environ.get("CXX")
        advice = "mend or unset it" if named else "install g++ or clang (or name one in the environment variable CXX)"
        what = f"CXX={named} is" if named else "there is"
        raise InputError(
            f"latency.runtimes has inductor, and {what} no C++ compiler for it: {advice}, or take inductor out."
        ) from error
