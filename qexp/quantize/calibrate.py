"""Calibration: forward passes that feed the observers, and the checks that they were fed, and with numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qexp.errors import NotFinite, RunError
from qexp.quantize.names import tensor_names
from qexp.quantize.observers import is_fed, is_finite, observers, records_range


def calibrate(prepared: nn.Module, batches: Iterable[Tensor]) -> int:
    """Run float32 [n, 3, H, W] batches through a prepared model; returns how many images that were.

    Raises RunError where an observer saw NaN, infinity or nothing at all, or where a BatchNorm's statistics moved.
    """
    before = _batchnorm_state(prepared)
    recording = {name: observer for name, observer in observers(prepared).items() if records_range(observer)}
    images = 0
    with torch.inference_mode():
        for batch in batches:
            if not batch.isfinite().all():
                raise NotFinite(
                    "calibration: a calibration image holds NaN or infinity after normalisation: check dataset.std"
                )
            try:
                prepared(batch)
            except RuntimeError as error:
                # torch's histogram raises at once where others keep the NaN.
                _refuse_not_finite(prepared, batch, [], error)
                raise
            images += len(batch)
    if images == 0:
        raise RunError("calib: there were no calibration images, so no range is known")
    if broken := [name for name, observer in recording.items() if is_fed(observer) and not is_finite(observer)]:
        _refuse_not_finite(prepared, batch, broken, None)
    _refuse_unfed(prepared, recording)
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


def _refuse_not_finite(prepared: nn.Module, batch: Tensor, broken: Sequence[str], error: Exception | None) -> None:
    """Run a batch once more to name the first tensor that was not finite; raises NotFinite if there is one.

    broken: names of observers that saw such a tensor, in any batch.
    """
    names = tensor_names(prepared)
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(observer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in broken or not inputs[0].isfinite().all():
                found.append(name)

        return hook

    handles = [observer.register_forward_pre_hook(look(name)) for name, observer in observers(prepared).items()]
    try:
        with torch.inference_mode():
            prepared(batch)
    except RuntimeError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    found += broken  # this batch may have taken another way
    if found:
        name = names.get(found[0], found[0])
        raise NotFinite(
            f"calibration: the output of {name} holds NaN or infinity, so it has no range: the float model itself "
            "is broken there; check model.checkpoint"
        ) from error


def _refuse_unfed(prepared: nn.Module, recording: Mapping[str, Any]) -> None:
    names = tensor_names(prepared)
    empty = [names.get(name, name) for name, observer in recording.items() if not is_fed(observer)]
    if empty:
        raise RunError(
            f"calibration fed no data to {len(empty)} observers, the first of them {', '.join(empty[:3])}: "
            "the model takes another path there than with the example"
        )
