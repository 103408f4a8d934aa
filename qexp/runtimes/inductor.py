"""torch.compile with freezing: FP32 only, compiled in the process that runs it, once per batch size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.runtimes.base import Loaded
from qexp.runtimes.eager import Eager


class Inductor(Eager):
    """Saves the same file as the eager runtime: nothing compiled is saved."""

    name = schema.RuntimeName.inductor

    def unavailable(self) -> str | None:
        """As in the base class: a clause where torch.compile finds no C++ compiler."""
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            named = os.environ.get("CXX")
            if named:
                return f"CXX={named} is no C++ compiler for it: mend or unset it"
            return "there is no C++ compiler for it: install g++ or clang (or name one in the environment variable CXX)"
        return None

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Load as the eager runtime; the first call with each batch size compiles, which takes seconds."""
        module = super().load(path, structure, engine).module
        options: dict[str, Any] = {"freezing": True}
        compiled = torch.compile(module, options=options, dynamic=False)
        return Loaded(compiled, engine)  # type: ignore[arg-type]
