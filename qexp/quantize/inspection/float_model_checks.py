"""Whether a float model can be compared with what is made of it: it answers with numbers, the same ones each time, and
what its modules compute is all there is to it.

Whatever breaks these rules is found by running the model, and named by the module in which it happens.
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

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Of the largest logit, between two float models that compute the same."""
TOLERANCE_UNTRAINED = 1e-3
"""The same where weights are random, which multiplies differences in the last bit (8e-5 was seen, with ResNet-50)."""

# A model that draws random numbers is called so often, with as many copies of an image each time, before its answers
# count as the same: some draw for every call, others for every value.
_CALLS = 12


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest of two models' logits for a batch, as a share of the largest logit; infinite where it is not finite.

    expected, actual: float32 [n, classes].
    """
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    found = float((actual - expected).abs().max()) / largest
    return math.inf if math.isnan(found) else found


def checked(module: nn.Module, image: Tensor, name: str) -> Tensor:
    """The logits of a float model for an image; raises InputError where they are not finite, or others each time.

    image: float32 [1, 3, H, W]; name: the image's, for a sentence. The sentence names a tensor, a module or a function.
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
        raise InputError(_autocast(module, image) or f"the float model gives logits in {dtype}; it must be float32.")
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
    """Why what is made of a float model computes another function than the model, as a sentence; empty where its
    modules are not to blame.

    image: float32 [1, 3, H, W].
    """
    try:
        return unrepeatable(module, image) or _autocast(module, image) or hooked(module, image)
    except Exception as error:  # to be watched may be too much for a model's own code
        logger.debug("the model can't be looked into: %s", first_line(error))
        return ""


def unrepeatable(module: nn.Module, image: Tensor) -> str:
    """Why the model answers an image otherwise each time, as a sentence; empty where it does not."""
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
        return f"the float model answers an image otherwise each time: {what}."
    what = f"its {_first_change(module, image)} keeps something from call to call, or draws random numbers"
    return f"the float model answers an image otherwise each time: {what}; in evaluation it must not."


def of_a_batch(module: nn.Module, image: Tensor, logits: Tensor) -> str:
    """Why the model can't be asked for several images at once, as a sentence; empty where it can.

    image: float32 [1, 3, H, W]; logits: what the model gives for it alone.
    """
    others = image.flip(-1) / 2, image.flip(-2) / 4  # of another mean and variance, too
    with torch.inference_mode():
        try:
            together: Tensor = module(torch.cat([image, *others]))
        except Exception as error:  # whatever a model's own code raises
            return f"the float model takes one image at a time, and fails with three: {first_line(error)}."
    if len(together) != 3:
        return f"the float model gives {len(together)} rows of logits for three images; it must give one for each."
    if difference(logits, together[:1]) <= TOLERANCE_UNTRAINED:
        return ""
    if reason := _without_statistics(module):
        return reason
    pairs = zip(_outline(module, image), _outline(module, torch.cat([image, *others])), strict=False)
    nowhere_else = place("", type(module).__name__)
    changed = (where for (where, a), (_, b) in pairs if difference(a, b[: len(a)]) > TOLERANCE_UNTRAINED)
    where = next(changed, nowhere_else)
    return f"the float model's answer for an image depends on the others in its batch, from its {where} on."


def _without_statistics(module: nn.Module) -> str:
    """Which BatchNorm has no statistics of its own, as a sentence; empty where all have some."""
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            return (
                f"{place(name, type(m).__name__)} has track_running_stats=False, and so takes mean and variance "
                "from the batch that it gets; train it with running statistics."
            )
    return ""


def drawn(module: nn.Module, image: Tensor) -> str:
    """Where the model draws random numbers in evaluation, and how not to, as a clause; empty where it draws none."""
    draw = _first_call(module, image, _Drawing)
    if draw is None:
        return ""
    where, function = draw
    functional = function.startswith("torch.nn.functional.") and "dropout" in function and "(Dropout" not in where
    advice = "pass it training=self.training" if functional else "draw them in training only"
    return f"{function} draws random numbers in its {where}, in evaluation too; {advice}"


def squeezed(module: nn.Module, image: Tensor) -> str:
    """Where the model drops the dimension of the images when there is one, and how not to, as a clause; else empty."""
    found = _first_call(module, image, _Squeezing)
    if found is None:
        return ""
    where, function = found
    return f"{function} in its {where} drops the dimension of the images, too, where there is one; write flatten(1)"


def hooked(module: nn.Module, image: Tensor) -> str:
    """Which layer has a hook that changes what the model answers, as a sentence; empty where none has.

    A fused or INT8 layer is another module, without the hook, and so is a traced model. Hooks of the modules between
    are traced as what they compute.
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
                        f"{what} has a hook that changes what the model computes, and is lost when modules are traced, "
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
    """Keeps the place of the first call of a torch function that `told` says something of, and what that is."""

    def __init__(self, stack: list[tuple[str, str]]) -> None:
        super().__init__()
        self._stack = stack
        self.found: tuple[str, str] | None = None

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        """What the call gives, and what there is to say of it. args: those without a name."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, said = self.told(lambda: func(*args, **(kwargs or {})), func, args)
        if said and self.found is None:
            self.found = place(*self._stack[-1]), said
        return result


class _Drawing(_Watch):
    """Of functions that draw random numbers, the name."""

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        before = torch.get_rng_state()
        result = call()
        if torch.equal(before, torch.get_rng_state()):
            return result, ""
        # torch may not list what makes tensors, such as torch.rand.
        return result, str(resolve_name(function) or f"torch.{getattr(function, '__name__', function)}")


class _Autocast(_Watch):
    """Of functions that are called under autocast, its dtype."""

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        on = torch.is_autocast_enabled("cpu")
        return call(), str(torch.get_autocast_dtype("cpu")).removeprefix("torch.") if on else ""


class _Squeezing(_Watch):
    """Of functions that take away every dimension of size 1, that of one image with them, the name."""

    def told(self, call: Callable[[], Any], function: Callable[..., Any], args: Any) -> tuple[Any, str]:
        name = getattr(function, "__name__", "")
        drops = name in ("squeeze", "squeeze_") and len(args) == 1 and args[0].ndim > 1 and len(args[0]) == 1
        result = call()
        return result, f"{name}()" if drops and result.ndim < 2 else ""


def _first_call(module: nn.Module, image: Tensor, kind: type[_Watch]) -> tuple[str, str] | None:
    """Where in a model, and what, the first call is of which `kind` has something to say."""
    with torch.inference_mode(), running(module) as stack, kind(stack) as watch, suppress(Exception):
        module(image)  # where it fails, it was watched until then
    return watch.found


def _outline(module: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """What passes between modules in one call of a model: copies, each with the module that made it."""
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
