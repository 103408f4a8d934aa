"""Calibration: forward passes that feed the observers, and the checks that they were fed, and with numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qexp.errors import RunError
from qexp.quantize.names import tensor_names
from qexp.quantize.observers import observers, records_range, seen_range


def calibrate(prepared: nn.Module, batches: Iterable[Tensor]) -> int:
    """Run float32 [n, 3, H, W] batches through a prepared model; returns how many images that were.

    Raises RunError where an observer saw NaN, infinity or nothing at all, or where a BatchNorm's statistics moved.
    """
    before = _batchnorm_state(prepared)
    images = 0
    with torch.inference_mode():
        for batch in batches:
            try:
                prepared(batch)
            except RuntimeError as error:
                # torch's histogram raises at once where minmax keeps the NaN.
                _refuse_not_finite(prepared, batch, error)
                raise
            images += len(batch)
            if not _finite(prepared):
                _refuse_not_finite(prepared, batch, None)
    if images == 0:
        raise RunError("calib: there were no calibration images, so no range is known")
    _refuse_unfed(prepared)
    for name, state in _batchnorm_state(prepared).items():
        if not torch.equal(state, before[name]):
            raise RunError(f"calibration changed the statistics of BatchNorm {name}: the model is not in eval mode")
    return images


def _batchnorm_state(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{buffer}": value.clone()
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm)
        for buffer, value in m.named_buffers(recurse=False)
    }


def _finite(prepared: nn.Module) -> bool:
    ranges = [seen_range(o) for o in observers(prepared).values() if records_range(o)]
    return all(low == math.inf or math.isfinite(low) and math.isfinite(high) for low, high in ranges)


def _refuse_not_finite(prepared: nn.Module, batch: Tensor, error: Exception | None) -> None:
    """Run the batch once more to name the first tensor that is not finite; raises RunError if there is one."""
    names = tensor_names(prepared)
    found: list[str] = []
    if not batch.isfinite().all():
        raise RunError("calibration: a calibration image holds NaN or infinity after normalisation: check dataset.std")

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        if not found and not inputs[0].isfinite().all():
            found.append(name)

    handles = [
        observer.register_forward_pre_hook(lambda m, inputs, name=names.get(name, name): look(name, inputs))
        for name, observer in observers(prepared).items()
    ]
    try:
        with torch.inference_mode():
            prepared(batch)
    except RuntimeError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if found:
        raise RunError(
            f"calibration: the output of {found[0]} holds NaN or infinity, so it has no range: the float model itself "
            "is broken there; check model.checkpoint"
        ) from error


def _refuse_unfed(prepared: nn.Module) -> None:
    names = tensor_names(prepared)
    empty = [names.get(n, n) for n, o in observers(prepared).items() if records_range(o) and seen_range(o)[0] == math.inf]
    if empty:
        raise RunError(
            f"calibration fed no data to {len(empty)} observers, the first of them {', '.join(empty[:3])}: "
            "the model takes another path there than with the example"
        )
