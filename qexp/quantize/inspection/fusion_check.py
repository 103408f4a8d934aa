"""Comparison of a fused model with its float model, and the place where they first differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qexp.models.class_names import derives_from
from qexp.quantize.flow import Flow
from qexp.quantize.graph.hooks import attached
from qexp.quantize.inspection.float_model_checks import TOLERANCE, cause, difference, drawn

_FUSED = "torch.ao.nn.intrinsic.modules.fused._FusedModule"


def fusion_difference(float_module: nn.Module, fused: nn.Module, batch: Tensor) -> float:
    """Return the largest difference of two models' logits, as a share of the largest; infinite if not finite."""
    with torch.inference_mode():
        return difference(float_module(batch), fused(batch))


def explained(float_module: nn.Module, fused: nn.Module, flow: Flow, batch: Tensor) -> str:
    """Return why a fused model's logits differ from the float model's, as a sentence: the cause, or the place.

    batch: float32 [n, 3, H, W], on which they differ; the float model's logits are finite.
    """
    with torch.inference_mode():
        apart = (float_module(batch) - fused(batch)).abs().nan_to_num(math.inf).reshape(len(batch), -1).amax(1)
    worst = batch[int(apart.argmax())][None]
    if reason := cause(float_module, worst):
        return reason
    found, where = fusion_difference(float_module, fused, batch), blame(float_module, fused, worst)
    return (
        f"the fused model differs from the float model by {found:.2g} of the largest logit, from {where} on: "
        f"{TOLERANCE:g} is allowed; {_advice(float_module, fused, flow, worst)}."
    )


def _advice(float_module: nn.Module, fused: nn.Module, flow: Flow, image: Tensor) -> str:
    """Return the fault of the fused model, if known, or a possible one, as a clause."""
    calls = Counter[str]()
    _run(float_module, image, lambda name, output: calls.update([name]))
    gone = [name for name, m in fused.named_modules() if isinstance(m, nn.Identity) and calls[name] > 1]
    if flow.fuses_on_request and gone:
        return (
            f"the module {gone[0]} is called {calls[gone[0]]} times, and is fused into the layer before one of these "
            "calls; give each call a module of its own"
        )
    if draws := drawn(float_module, image):  # so rarely that it was not observed before
        return draws
    if flow.fuses_on_request:
        return "only modules that always run one after the other may be fused"
    return "tracing follows one call of forward, and decisions that forward takes at each call are lost"


def blame(float_module: nn.Module, fused: nn.Module, batch: Tensor) -> str:
    """Return the first block of `fused` (or module, if a flow has dissolved the blocks) whose output differs.

    A block is compared with the float model's block of the same name. A fused module has the output of the last module
    of its chain, whichever that was, so it is compared with all outputs of the float model.
    """
    expected: list[tuple[str, Tensor]] = []
    _run(float_module, batch, lambda name, output: expected.append((name, output)))
    blocks = {name for name, m in fused.named_modules() if list(m.children()) and not derives_from(m, _FUSED)}
    found: list[str] = []

    def close(output: Tensor, other: Tensor) -> bool:
        return float((output - other).abs().max()) <= TOLERANCE * max(float(other.abs().max()), 1e-30)

    def look(name: str, output: Tensor) -> None:
        others = [other for known, other in expected if name not in blocks or known == name]
        if not found and not any(close(output, other) for other in others if other.shape == output.shape):
            found.append(name)

    _run(fused, batch, look)
    return found[0] if found else "its own forward"


def _run(module: nn.Module, batch: Tensor, see: Callable[[str, Tensor], None]) -> None:
    def hook(name: str) -> Callable[..., None]:
        def forward_hook(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                # A copy, since a ReLU may work in place on it.
                see(name, output.clone())

        return forward_hook

    hooks = (m.register_forward_hook(hook(name)) for name, m in module.named_modules() if name)
    with torch.inference_mode(), attached(hooks):
        module(batch)
