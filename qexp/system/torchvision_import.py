"""torchvision, imported in the one place that copes with a build of it for another torch.

A torchvision built for CUDA torch can't load its compiled operators beside a CPU build of torch of the same version,
and its import then fails with `operator torchvision::nms does not exist`. Nothing that is used here is compiled, so
the two operators are declared, without an implementation, and the import is tried again. On a matched pair nothing
happens.

torchvision's RoI Align, which nothing here calls, imports torch.compile's machinery, two seconds of every process's
start. It gets a stand-in that imports it when called.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from torch.library import Library

# Held for the life of the process: the declarations vanish with the Library object.
_declared: list[Library] = []


def is_mismatch(error: BaseException) -> bool:
    """True if an import failed because torchvision's compiled operators did not load."""
    return "operator torchvision::" in str(error) and "does not exist" in str(error)


def _import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not is_mismatch(error):
            raise
    library = Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    # The failed import leaves submodules behind that hold half of their names.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


@contextlib.contextmanager
def _compiler_when_called() -> Iterator[None]:
    """Let imports within the context take `is_compile_supported` from torch._dynamo.utils without importing that."""
    package, utils = "torch._dynamo", "torch._dynamo.utils"
    if package in sys.modules:
        yield
        return

    def is_compile_supported(device_type: str) -> object:
        return importlib.import_module(utils).is_compile_supported(device_type)

    stand_in = ModuleType(utils)
    vars(stand_in)["is_compile_supported"] = is_compile_supported
    sys.modules |= {package: ModuleType(package), utils: stand_in}
    try:
        yield
    finally:
        del sys.modules[package], sys.modules[utils]


with _compiler_when_called():
    torchvision = _import_torchvision()
