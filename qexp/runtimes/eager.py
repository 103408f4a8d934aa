"""PyTorch's eager mode: saves a state_dict; the structure is built again from the model and the settings.

A pickled INT8 module saves but does not load; a state_dict does, and without running any code in the file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.errors import RunError, first_line
from qexp.records import CUDA, Precision, Variant
from qexp.runtimes.base import Loaded, Runtime, packing_for


class Eager(Runtime):
    name = schema.RuntimeName.eager

    def file(self, precision: Precision) -> str:
        return f"{Variant(precision, schema.RuntimeName.eager)}.pt"

    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        """Save the state_dict; tensors that layers share are saved once."""
        state = model.state_dict()
        _share(state)
        torch.save(state, path)
        return path

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Load the file into a new structure, whose own tensors are replaced, not overwritten."""
        with warnings.catch_warnings():
            # torch.load's own doing: it rebuilds quantized tensors from typed storages.
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
            state = torch.load(path, weights_only=True)
        module = structure()
        try:
            with packing_for(engine):
                module.load_state_dict(state, assign=True)
        except (RuntimeError, KeyError) as error:
            raise RunError(f"{path} doesn't hold the model that these settings make: {first_line(error)}") from error
        return Loaded(module.eval().requires_grad_(False), engine)


def _share(state: MutableMapping[str, Any]) -> None:
    """Replace equal tensors by one, which torch.save writes once.

    A layer that is called at several places has one copy per call after fusing, and its weights are packed for
    each.
    """
    found: dict[tuple[object, ...], list[Tensor]] = {}

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, value))
        if not isinstance(value, Tensor) or value.numel() <= 1:
            return value
        alike = found.setdefault((value.dtype, value.shape, value.stride()), [])
        for other in alike:
            if torch.equal(value, other):
                return other
        alike.append(value)
        return value

    for name in state:
        state[name] = one(state[name])


def with_cuda(variants: Mapping[Variant, Loaded]) -> dict[Variant, Callable[[Tensor], Tensor]]:
    """The variants, and where there is a GPU the eager float model on it; a call copies the images there and the logits
    back."""
    eager = Variant(Precision.fp32, schema.RuntimeName.eager)
    if not torch.cuda.is_available() or eager not in variants:
        return dict(variants)
    module = copy.deepcopy(variants[eager].module).cuda()
    return {**variants, Variant(Precision.fp32, CUDA): lambda images: module(images.cuda()).cpu()}
