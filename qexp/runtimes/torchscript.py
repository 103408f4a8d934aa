"""TorchScript: traced, frozen and saved. Deprecated, unsupported from Python 3.14, and used here only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.errors import RunError, first_line
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.graph.exported import is_program, is_size, operation
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.runtimes.base import HERE, Loaded, Runtime, packing_for


class _Shell(nn.Module):
    """Wraps `module` for tracing, and hides its submodules: torch would script every submodule of a traced module,
    which takes far longer than the trace, and freezing removes them all.

    Only values that a trace can't take as constants are registered: packed weights, and modules that are scripted
    already. Each call of a shared layer has its own packed weights, though one for all would make a smaller file:
    kernels of oneDNN and QNNPACK cache in them data for the scales of one call, and took up to a third longer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)
        parts = list(module.modules())
        packed = [value for part in parts for value in vars(part).values() if isinstance(value, torch.ScriptObject)]
        scripted = [part for part in parts if isinstance(part, torch.jit.ScriptModule)]
        for index, own in enumerate([*packed, *scripted]):
            setattr(self, f"own_{index}", own)

    def forward(self, images: Tensor) -> Tensor:
        (module,) = self._module
        logits: Tensor = module(images)
        return logits


def _with_methods(model: nn.Module) -> nn.Module:
    """Return a program with methods of tensors in place of the operators that take sizes which it computes: a trace
    follows such a size through methods, and takes it for a constant in an operator. Other models are returned as
    they are."""
    if not is_program(model):
        return model
    copied = cast(fx.GraphModule, sharing_copy(model))
    for node in copied.graph.nodes:
        if isinstance(node.target, OpOverload) and any(is_size(one) for one in node.all_input_nodes):
            name = operation(node)
            node.op, node.target = ("call_method", name) if hasattr(Tensor, name) else (node.op, getattr(torch, name))
    copied.recompile()
    return copied


class TorchScript(Runtime):
    name = schema.RuntimeName.torchscript
    predicts_for_others = True

    def loading_code(self, file: str) -> tuple[str, str]:
        return "", f'model = torch.jit.load({HERE} / "{file}").eval()\n'

    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        """Trace with the first image of the example, freeze and save; the saved model takes any number of images.

        Raises RunError where a trace can't follow the model, or only for one number of images.
        """
        # Two images: a trace of a single one would let a model that squeezes its output lose the batch dimension.
        example = torch.cat([example[:1], example[:1]])
        with known_deprecations_silenced(), torch.no_grad():
            # torch's own modules turn their scale and zero point into numbers, which is what a trace should hold.
            warnings.filterwarnings(
                "ignore",
                message="Converting a tensor to a Python (float|integer) might cause the trace to be incorrect",
                category=torch.jit.TracerWarning,
                module=r"torch\.(_ops$|ao\.nn\.quantized\.)",
            )
            try:
                traced = torch.jit.trace(_Shell(_with_methods(model.eval())).eval(), example, check_trace=False)
                traced(example[:1])
            except RuntimeError as error:
                own = RuntimeError(str(error).rpartition("RuntimeError: ")[2])  # behind the calls of the trace
                reason = first_line(own)
                instead = "take torchscript out of runtimes"
                raise RunError(f"torchscript can't trace the model: {reason}: {instead}") from error
            torch.jit.save(torch.jit.freeze(traced), path)
        return path

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Read the model; the file contains its structure.

        It has no state, but for oneDNN's dynamic linear layer, which stores the range of its input: of two calls at a
        time, one would use the other's range (torch 2.13).
        """
        again = partial(self.load, path, structure, engine)
        with known_deprecations_silenced(), packing_for(engine):
            return Loaded(torch.jit.load(path), engine, again=again, reentrant=engine is not Engine.onednn)
