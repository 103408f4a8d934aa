"""Whether a fused model still computes what the float model does, and where it stops doing so."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule


def fusion_difference(float_module: nn.Module, fused: nn.Module, batch: Tensor) -> float:
    """Largest difference of two models' logits on a batch, as a share of the largest logit (infinite if not finite)."""
    with torch.inference_mode():
        expected, actual = float_module(batch), fused(batch)
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    difference = float((actual - expected).abs().max()) / largest
    return math.inf if math.isnan(difference) else difference


def blame(float_module: nn.Module, fused: nn.Module, batch: Tensor, tolerance: float = 1e-4) -> str:
    """The first block of `fused` (or the first module, where a flow has dissolved the blocks) that computes another
    output than in the float model.

    A block must give what the block of its name does. A fused module gives what the last of its chain did, whichever
    that was, so it is looked for among all outputs of the float model.
    """
    expected: list[tuple[str, Tensor]] = []
    _run(float_module, batch, lambda name, output: expected.append((name, output)))
    blocks = {name for name, m in fused.named_modules() if list(m.children()) and not isinstance(m, _FusedModule)}
    found: list[str] = []

    def look(name: str, output: Tensor) -> None:
        others = [other for known, other in expected if name not in blocks or known == name]
        if not found and not any(_close(output, other, tolerance) for other in others if other.shape == output.shape):
            found.append(name)

    _run(fused, batch, look)
    return found[0] if found else "its own forward"


def _close(output: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((output - other).abs().max()) <= tolerance * max(float(other.abs().max()), 1e-30)


def _run(module: nn.Module, batch: Tensor, see: Callable[[str, Tensor], None]) -> None:
    def hook(name: str) -> Callable[..., None]:
        def forward_hook(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                # A copy, for a ReLU may work in place on it.
                see(name, output.clone())

        return forward_hook

    handles = [m.register_forward_hook(hook(name)) for name, m in module.named_modules() if name]
    try:
        with torch.inference_mode():
            module(batch)
    finally:
        for handle in handles:
            handle.remove()
