"""Calibration: forward passes that feed the observers, and checks that each saw data, all of it finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qexp.errors import NotFinite, RunError
from qexp.quantize.calibration.observers import is_fed, is_finite, observers, records_range
from qexp.quantize.calibration.recording_observer import Recording
from qexp.quantize.flow import Prepared
from qexp.quantize.graph.hooks import attached
from qexp.quantize.graph.tensor_names import tensor_names
from qexp.system import machine_lock


def calibrate(
    prepared: Prepared,
    batches: Sequence[Any],
    named: Callable[[int], str] = "calibration image {}".format,
    as_input: Callable[[Any], Tensor] = lambda batch: batch,
) -> int:
    """Run batches of images through a prepared model, and return the number of images.

    named: from an image's position to its name in messages; as_input: from a batch to float32 [n, 3, H, W]. Raises
    NotFinite if an observer saw NaN or infinity, RunError if one saw nothing at all or a BatchNorm's statistics
    changed.
    """
    module = prepared.module
    before = _batchnorm_state(module)
    recording = {name: observer for name, observer in observers(module).items() if records_range(observer)}
    images = 0
    # torch's histogram skips a tensor that contains infinity, with a warning; recorders note it.
    own = {name: observer for name, observer in recording.items() if not isinstance(observer, Recording)}
    with torch.inference_mode(), _stopping_at_infinity(own):
        for inputs in map(as_input, batches):
            if not inputs.isfinite().all():
                raise NotFinite(
                    "calibration: a calibration image holds NaN or infinity after normalisation: check dataset.std"
                )
            try:
                with machine_lock.computing():
                    module(inputs)
            except _Infinite as stop:
                _refuse_not_finite(module, map(as_input, batches), named, [stop.args[0]])
            images += len(inputs)
    if images == 0:
        raise RunError("calib: there were no calibration images, so no range is known")
    if broken := [name for name, observer in recording.items() if is_fed(observer) and not is_finite(observer)]:
        _refuse_not_finite(module, map(as_input, batches), named, broken)
    _refuse_unfed(module, recording)
    for name, state in _batchnorm_state(module).items():
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


def _refuse_not_finite(
    prepared: nn.Module,
    batches: Iterable[Tensor],
    named: Callable[[int], str],
    broken: Sequence[str],
) -> NoReturn:
    """Run the batches again, and raise NotFinite naming the first tensor that is not finite.

    It names the image, too, if the tensor is finite for others. broken: names of observers that saw such a tensor.
    """
    names, seen = tensor_names(prepared), 0
    first, culprits = broken[0], dict[int, str]()  # from position to observer
    for batch in batches:
        if found := _not_finite(prepared, batch):
            first = first if culprits else found
            alone = enumerate(_not_finite(prepared, image) for image in batch.split(1))
            culprits |= {seen + position: observer for position, observer in alone if observer}
        seen += len(batch)
        if culprits and len(culprits) < seen:
            break
    observer = next(iter(culprits.values()), first)
    what = f"calibration: the output of {names.get(observer, observer)} holds NaN or infinity"
    if len(culprits) in (0, seen):  # no image by itself, or every one
        only = f" for {named(0)}" if seen == 1 else ""
        raise NotFinite(
            f"{what}{only}, so it has no range: the float model itself is broken there; check model.checkpoint"
        )
    more = f" and {len(culprits) - 1} more of the first {seen} images" if len(culprits) > 1 else ""
    raise NotFinite(
        f"{what} for {named(min(culprits))}{more}, and not for others, so it has no range: mend the model (does it "
        "divide by zero there, or take a logarithm or a root?) or take the image out"
    )


def _not_finite(prepared: nn.Module, images: Tensor) -> str:
    """Return the name of the observer of the first tensor that isn't finite for `images`; "" if there is none."""
    try:
        with torch.inference_mode(), _stopping_at_infinity(observers(prepared)):
            prepared(images)
    except _Infinite as stop:
        return str(stop)
    return ""


class _Infinite(Exception):
    """Raised with the name of an observer that was about to see NaN or infinity."""


@contextmanager
def _stopping_at_infinity(watched: Mapping[str, nn.Module]) -> Iterator[None]:
    """In this context each of these observers raises _Infinite before it sees NaN or infinity."""

    def look(name: str) -> Callable[..., None]:
        def hook(observer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not inputs[0].isfinite().all():
                raise _Infinite(name)

        return hook

    with attached(observer.register_forward_pre_hook(look(name)) for name, observer in watched.items()):
        yield


def _refuse_unfed(prepared: nn.Module, recording: Mapping[str, Any]) -> None:
    names = tensor_names(prepared)
    empty = [names.get(name, name) for name, observer in recording.items() if not is_fed(observer)]
    if empty:
        raise RunError(
            f"calibration fed no data to {len(empty)} observers, the first of them {', '.join(empty[:3])}: "
            "the model takes another path there than with the example"
        )
