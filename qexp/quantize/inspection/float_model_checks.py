"""Checks that a float model can be compared with its INT8 counterpart.

Its logits must be finite and repeatable, and its modules must compute all of them. Faults are found by running the
model, and the message names the module in which they occur.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name

from qexp.errors import InputError, first_line
from qexp.quantize.graph.copies import evaluation_copy
from qexp.quantize.graph.tensor_names import place, running
from qexp.quantize.graph.tracing import standard_type

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Allowed difference of two equivalent float models, as a share of the largest logit."""
TOLERANCE_UNTRAINED = 1e-3
"""The same for random weights, which amplify differences in the last bit (8e-5 was observed with ResNet-50)."""

# A model that draws random numbers is called this often, with as many copies of an image each time, before its logits
# count as repeatable: some models draw for every call, others for every value.
_CALLS = 12


def difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference of two models' logits, as a share of the largest logit; infinite if not finite.

    expected, actual: float32 [n, classes].
    """
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    found = float((actual - expected).abs().max()) / largest
    return math.inf if math.isnan(found) else found


def checked(module: nn.Module, image: Tensor, name: str) -> Tensor:
    """Return the logits of a float model for an image. Raises InputError if they are not finite or not repeatable.

    image: float32 [1, 3, H, W]; name: the image's, for messages. The message names a tensor, a module or a function.
    """
    if not image.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity after normalisation; check dataset.std.")
    try:
        with torch.inference_mode():
            logits: Tensor = module(image)
    except Exception as error:  # whatever a model's own code raises
        reason = f"the float model can't take one image alone: {squeezed(module, image) or first_line(error)}."
        raise InputError(_without_statistics(module) or reason) from error
    if logits.dtype not in (torch.float32, torch.float64):
        dtype = str(logits.dtype).removeprefix("torch.")
        raise InputError(_autocast(module, image) or f"the float model returns logits in {dtype}; it must be float32.")
    if not logits.isfinite().all():
        broken = [label for label, value in module.named_parameters() if not value.isfinite().all()]
        if broken:
            raise InputError(f"{broken[0]} of the float model holds NaN or infinity; check model.checkpoint.")
        where = _first_not_finite(module, image)
        raise InputError(f"the float model gives NaN or infinity for {name}, from its {where} on; mend it there.")
    if reason := unrepeatable(module, image) or of_a_batch(module, image, logits):
        raise InputError(reason)
    return logits


def cause(module: nn.Module, image: Tensor) -> str:
    """Return why a fused or INT8 model computes another function than its float model, as a sentence.

    It is "" if no fault of the float model explains it. image: float32 [1, 3, H, W].
    """
    try:
        return unrepeatable(module, image) or _autocast(module, image) or hooked(module, image)
    except Exception as error:  # a model's own code may fail when watched
        log.debug("the model can't be looked into: %s", first_line(error))
        return ""


def unrepeatable(module: nn.Module, image: Tensor) -> str:
    """Return why the model's logits for an image differ from call to call, as a sentence; "" if they don't."""
    before = torch.get_rng_state()
    with torch.inference_mode():
        first = module(image)
        if torch.equal(before, torch.get_rng_state()):
            same = difference(first, module(image)) <= TOLERANCE_UNTRAINED
        else:
            images, logits = image.repeat(_CALLS, 1, 1, 1), first.repeat(_CALLS, 1)
            same = all(difference(logits, module(images)) <= TOLERANCE_UNTRAINED for _ in range(_CALLS))
    if same:
        return ""
    if what := drawn(module, image):
        return f"the float model has other logits for an image each time: {what}."
    what = f"its {_first_change(module, image)} keeps something from call to call, or draws random numbers"
    return f"the float model has other logits for an image each time: {what}; in evaluation it must not."


def of_a_batch(module: nn.Module, image: Tensor, logits: Tensor) -> str:
    """Return why the model doesn't support several images at once, as a sentence; "" if it does.

    image: float32 [1, 3, H, W]; logits: the model's output for it alone.
    """
    others = image.flip(-1) / 2, image.flip(-2) / 4  # of another mean and variance, too
    with torch.inference_mode():
        try:
            together: Tensor = module(torch.cat([image, *others]))
        except Exception as error:  # whatever a model's own code raises
            return f"the float model takes one image at a time, and fails with three: {first_line(error)}."
    if len(together) != 3:
        return f"the float model returns {len(together)} rows of logits for three images; it must give one for each."
    if difference(logits, together[:1]) <= TOLERANCE_UNTRAINED:
        return ""
    if reason := _without_statistics(module):
        return reason
    pairs = zip(_outline(module, image), _outline(module, torch.cat([image, *others])), strict=False)
    nowhere_else = place("", type(module).__name__)
    changed = (where for (where, a), (_, b) in pairs if difference(a, b[: len(a)]) > TOLERANCE_UNTRAINED)
    where = next(changed, nowhere_else)
    return f"the float model's output for an image depends on the others in its batch, from its {where} on."


def _without_statistics(module: nn.Module) -> str:
    """Return which BatchNorm has no running statistics, as a sentence; "" if all have them."""
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            return (
                f"{place(name, type(m).__name__)} has track_running_stats=False, and so takes mean and variance "
                "from the batch that it gets; train it with running statistics."
            )
    return ""


def drawn(module: nn.Module, image: Tensor) -> str:
    """Return where the model draws random numbers in evaluation, and the remedy, as a clause; "" if it draws none."""
    draw = _first_call(module, image, _Drawing)
    if draw is None:
        return ""
    where, function = draw
    functional = function.startswith("torch.nn.functional.") and "dropout" in function and "(Dropout" not in where
    advice = "pass it training=self.training" if functional else "draw them in training only"
    return f"{function} draws random numbers in its {where}, in evaluation too; {advice}"


def squeezed(module: nn.Module, image: Tensor) -> str:
    """Return where the model drops the batch dimension of a single image, and the remedy, as a clause; else ""."""
    found = _first_call(module, image, _Squeezing)
    if found is None:
        return ""
    where, function = found
    return f"{function} in its {where} also drops the batch dimension of a single image; write flatten(1)"


def hooked(module: nn.Module, image: Tensor) -> str:
    """Return which layer has a hook that changes the model's output, as a sentence; "" if none has.

    A fused or INT8 layer is another module, without the hook, and so is a traced model. Hooks of containers are traced
    with the rest.
    """
    if not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return ""
    plain = evaluation_copy(module, image)  # weight norm and its like are hooks too, which are gone in it
    with torch.inference_mode():
        expected = plain(image)
        for name, m in plain.named_modules():
            if (m._forward_hooks or m._forward_pre_hooks) and (standard_type(m) is not None or m is plain):
                m._forward_hooks.clear()
                m._forward_pre_hooks.clear()
                if difference(expected, plain(image)) > TOLERANCE:
                    what = place(name, type(m).__name__) if name else f"the model itself ({type(m).__name__})"
                    return (
                        f"{what} has a hook that changes the model's output, and is lost when modules are traced, "
                        "fused or quantized; write what it does into forward."
                    )
    return ""


def _autocast(module: nn.Module, image: Tensor) -> str:
    found = _first_call(module, image, _Autocast)
    if found is None:
        return ""
    where, dtype = found
    return (
        f"{where} computes in {dtype} under torch.autocast, and INT8 is compared with FP32; leave autocast to the code"
        " that trains the model."
    )


# ------------------------------------------------------------------------------------------------ where it begins


class _Watch(TorchFunctionMode):
    """Records the first call of a torch function for which `told` returns a description, with its place."""

    def __init__(self, stack: list[tuple[str, str]]) -> None:
        super().__init__()
        self._stack = stack
        self.found: tuple[str, str] | None = None

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        """Return the call's result, and a description or "". args: positional arguments."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, said = self.told(lambda: func(*args, **(kwargs or {})), func, args)
        if said and self.found is None:
            self.found = place(*self._stack[-1]), said
        return result


class _Drawing(_Watch):
    """Describes functions that draw random numbers, by name."""

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        before = torch.get_rng_state()
        result = call()
        if torch.equal(before, torch.get_rng_state()):
            return result, ""
        # torch may not list factory functions such as torch.rand.
        return result, str(resolve_name(function) or f"torch.{getattr(function, '__name__', function)}")


class _Autocast(_Watch):
    """Describes functions that are called under autocast, by its dtype."""

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        on = torch.is_autocast_enabled("cpu")
        return call(), str(torch.get_autocast_dtype("cpu")).removeprefix("torch.") if on else ""


class _Squeezing(_Watch):
    """Describes functions that drop every dimension of size 1, the batch dimension of one image included, by name."""

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        name = getattr(function, "__name__", "")
        drops = name in ("squeeze", "squeeze_") and len(args) == 1 and args[0].ndim > 1 and len(args[0]) == 1
        result = call()
        return result, f"{name}()" if drops and result.ndim < 2 else ""


def _first_call(module: nn.Module, image: Tensor, kind: type[_Watch]) -> tuple[str, str] | None:
    """Return the place and the description of the first call that a watch of this kind describes; None if none."""
    with torch.inference_mode(), running(module) as stack, kind(stack) as watch, suppress(Exception):
        module(image)  # if it fails, calls until then were watched
    return watch.found


def _outline(module: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """Return copies of the tensors that pass between modules in one call of a model, with each one's module."""
    seen: list[tuple[str, Tensor]] = []

    def keep(where: tuple[str, str], values: Any) -> None:
        for value in values if isinstance(values, tuple | list) else [values]:
            if isinstance(value, Tensor):
                seen.append((place(*where), value.clone()))

    with torch.inference_mode(), running(module, before=keep, after=keep):
        module(image)
    return seen


def _first_not_finite(module: nn.Module, image: Tensor) -> str:
    nowhere_else = place("", type(module).__name__)
    return next((where for where, value in _outline(module, image) if not value.isfinite().all()), nowhere_else)


def _first_change(module: nn.Module, image: Tensor) -> str:
    nowhere_else = place("", type(module).__name__)
    pairs = zip(_outline(module, image), _outline(module, image), strict=False)
    return next((where for (where, a), (_, b) in pairs if not torch.equal(a, b)), nowhere_else)
