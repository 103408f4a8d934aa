"""The flows that quantize a model, a file each, and `FLOWS`, which finds them by name.

A flow is imported when it is first asked for: none needs the libraries of another.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

import torch

from qexp.config.schema import FlowName
from qexp.errors import InputError
from qexp.quantize.flow import Flow

_CLASSES = {
    FlowName.eager: "EagerFlow",
    FlowName.fx: "FxFlow",
    FlowName.pt2e: "Pt2eFlow",
    FlowName.dynamic: "DynamicFlow",
}


class _Flows(Mapping[FlowName, Flow]):
    """The flows by name. Raises InputError for one whose library can't be imported."""

    def __init__(self) -> None:
        self._made: dict[FlowName, Flow] = {}

    def __getitem__(self, name: FlowName) -> Flow:
        if name not in self._made:
            try:
                module = importlib.import_module(f"{__name__}.{name}")
            except ImportError as error:
                raise InputError(
                    f"flow={name} is made of torch.ao.quantization, which can't be imported from torch "
                    f"{torch.__version__} ({error}): use flow=pt2e, which does without it."
                ) from error
            self._made[name] = getattr(module, _CLASSES[name])()
        return self._made[name]

    def __iter__(self) -> Iterator[FlowName]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


FLOWS: Mapping[FlowName, Flow] = _Flows()


def usable_flows() -> Iterator[Flow]:
    """Yield the flows whose libraries are there."""
    for name in FLOWS:
        if not name.missing:
            try:
                yield FLOWS[name]
            except InputError:
                continue
