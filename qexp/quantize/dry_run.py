"""A trial of a whole flow on one image before any work: it tells which settings support a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from qexp.errors import InputError, NotFinite, QexpError, first_line, one_line
from qexp.quantize.calibration.grid import QUANT_MAX
from qexp.quantize.calibration.passes import calibrate
from qexp.quantize.flow import Flow, QuantizationSpec, QuantizedModel
from qexp.quantize.flows import usable_flows
from qexp.quantize.inspection import float_model_checks
from qexp.quantize.inspection.executed_operators import beyond
from qexp.quantize.inspection.float_model_checks import TOLERANCE_UNTRAINED, difference
from qexp.quantize.inspection.fusion_check import explained
from qexp.quantize.inspection.int8_model import check_layers
from qexp.quantize.inspection.untrusted_operators import run_or_refuse
from qexp.quantize.torch_backend.deprecations import unprinted
from qexp.quantize.torch_backend.engines import engine, supported

log = logging.getLogger(__name__)


def dry_run(
    model: nn.Module, flow: Flow, spec: QuantizationSpec, example: Tensor, image: str = "the example"
) -> QuantizedModel:
    """Take a float model through the whole flow, and return the result, whose ranges are those of one image.

    example: float32 [n, 3, H, W], n ≥ 1; image: the name of the first, for messages. Raises InputError naming the
    module where it fails and settings that would work.
    """
    one = example[:1]
    logits = float_model_checks.checked(model, one, image)
    try:
        with unprinted():
            return _through(model, flow, spec, one, image, logits)
    except NotFinite as error:
        raise InputError(str(error)) from error
    except Exception as error:
        # torch raises many classes of errors on a model that it can't quantize.
        sentence = float_model_checks.cause(model, one)
        sentence = sentence or (str(error) if isinstance(error, QexpError) else _of_torch(error, model, flow, one))
        alternatives = list(_alternatives(flow, spec))
        for by_torch in (True, False):  # the others execute in some runtimes only, and take seconds to try
            working = [
                change
                for change, other, changed in alternatives
                if other.name.executed_by_torch is by_torch and _takes(model, other, changed, one, image, logits)
            ]
            if working:
                break
        advice = f"this model works with {' or with '.join(working)}" if working else "no flow takes this model"
        raise InputError(f"{sentence.rstrip('.')}; {advice}.") from error


def _through(
    model: nn.Module, flow: Flow, spec: QuantizationSpec, one: Tensor, image: str, logits: Tensor
) -> QuantizedModel:
    """The model quantized; raises an error if the flow doesn't support it. one: [1, 3, H, W]; logits: the float
    model's, for it."""
    if flow.traced and (reason := float_model_checks.hooked(model, one)):
        raise InputError(reason)
    fused = flow.fuse(model, spec, one)
    with torch.inference_mode():
        same = difference(logits, fused(one)) <= TOLERANCE_UNTRAINED
    if not same:
        raise InputError(explained(model, fused, flow, one))
    prepared = flow.prepare(fused, spec, one)
    if flow.calibrates:
        calibrate(prepared, [one], lambda number: image)
    quantized = flow.convert(prepared)
    with engine(spec.engine):
        # Two images: with one, a kernel that takes the batch for channels goes unnoticed.
        run_or_refuse(quantized.module, flow, torch.cat([one, one]))
    if flow.name.executed_by_torch:
        _refuse_beyond(quantized, one)
    if not any(layer.int8 for layer in quantized.layers):
        raise InputError(f"flow={flow.name} finds no layer in {type(model).__name__} that it could quantize")
    check_layers(quantized, one)
    return quantized


def _refuse_beyond(quantized: QuantizedModel, one: Tensor) -> None:
    """Raise InputError for an operator of torch whose output can't be kept within fewer than 8 bits."""
    from qexp.quantize.torch_backend.ignored_quant_max import quant_max_of

    quant_max, flow = quant_max_of(quantized.module), quantized.flow
    if quant_max < QUANT_MAX and (operator := beyond(quantized.module, quantized.engine, one, quant_max)):
        raise InputError(
            f"flow={flow.name} can't keep the output of {operator} within qconfig.activation.bits="
            f"{quantized.qconfig.activation.bits}, since torch's kernel supports only 8: call it as a module of "
            "torch.nn, or use qconfig.activation.bits=8"
        )


def _alternatives(flow: Flow, spec: QuantizationSpec) -> Iterator[tuple[str, Flow, QuantizationSpec]]:
    """Yield other settings that may support the model: the change in words, the flow and the settings."""
    for name in supported()[:1]:
        if name is not spec.engine:
            yield f"engine={name}", flow, replace(spec, engine=name)
    for other in usable_flows():
        for fusion in (True, False) if other.fuses_on_request else (True,):
            if other is flow and (fusion == spec.fusion or not flow.fuses_on_request):
                continue
            change = [] if other is flow and not fusion else [f"flow={other.name}"]
            yield " ".join([*change, *([] if fusion else ["fusion=false"])]), other, replace(spec, fusion=fusion)


def _takes(model: nn.Module, flow: Flow, spec: QuantizationSpec, one: Tensor, image: str, logits: Tensor) -> bool:
    try:
        with unprinted():
            _through(model, flow, spec, one, image, logits)
    except Exception as error:  # any error: these settings are not recommended
        log.debug("flow=%s engine=%s does not take the model either: %s", flow.name, spec.engine.value, one_line(error))
        return False
    return True


def _of_torch(error: Exception, model: nn.Module, flow: Flow, image: Tensor) -> str:
    reason = float_model_checks.squeezed(model, image) or first_line(error)
    return f"flow={flow.name} can't quantize {type(model).__name__}: {reason}"
