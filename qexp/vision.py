"""torchvision, imported in the one place that copes with a build of it for another torch.

A torchvision built for CUDA torch can't load its compiled operators beside a CPU build of torch of the same version,
and its import then fails with `operator torchvision::nms does not exist`. Nothing that is used here is compiled, so
the two operators are declared, without an implementation, and the import is tried again. On a matched pair nothing
happens.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# Kept for the life of the process: the declarations vanish with the Library object.
_declared: list[torch.library.Library] = []


def is_mismatch(error: BaseException) -> bool:
    """Whether an import failed because torchvision's compiled operators did not load."""
    return "operator torchvision::" in str(error) and "does not exist" in str(error)


def _import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not is_mismatch(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    # The failed import leaves submodules behind that hold half of their names.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
