"""From a float model to an INT8 one: the only package that knows torch.ao.quantization.

The steps are `fuse` → `prepare` → `calibrate` → `convert`, the same for every flow; `skeleton` makes the converted
structure without data, for a saved state_dict to be loaded into.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor, nn

from qexp.config.schema import ActivationObserver, Engine, Flow, Observer, QConfig, Target
from qexp.errors import InputError, NotFinite, QexpError, first_line, one_line
from qexp.quantize.calibration.cached import calibrate_once
from qexp.quantize.calibration.grid import (
    HIGHEST,
    SAFE_BITS,
    SAFE_CODE,
    Grid,
    Side,
    executed_bits,
    grid,
    highest_activation,
)
from qexp.quantize.calibration.observers import fix_fewer_levels, highest_observed, observers, records_range
from qexp.quantize.calibration.passes import calibrate
from qexp.quantize.flows import dynamic, eager, fx
from qexp.quantize.graph.copies import evaluation_copy, sharing_copy
from qexp.quantize.inspection import float_checks
from qexp.quantize.inspection.float_checks import TOLERANCE, TOLERANCE_UNTRAINED, difference
from qexp.quantize.inspection.fusion_check import blame, explained, fusion_difference
from qexp.quantize.inspection.layer_check import check_layers
from qexp.quantize.inspection.layers import layers, read_qparams
from qexp.quantize.inspection.operators import beyond, executed
from qexp.quantize.inspection.unsupported_operators import run_or_refuse
from qexp.quantize.saturation import emulation, kernels, narrowing
from qexp.quantize.saturation.narrowing import Narrowed
from qexp.quantize.torch_backend.deprecations import say_once_silently, unprinted
from qexp.quantize.torch_backend.engines import engine, require, supported
from qexp.quantize.torch_backend.ignored_quant_max import highest_code, hold
from qexp.quantize.torch_backend.missing_state import scales_in_state
from qexp.quantize.torch_backend.onednn_strided_pointwise import contiguous_clamps, without_strides
from qexp.quantize.torch_backend.qnnpack_biases import fit_biases

__all__ = [
    "SAFE_BITS",
    "SAFE_CODE",
    "TOLERANCE",
    "Grid",
    "Narrowed",
    "Side",
    "blame",
    "calibrate",
    "calibrate_once",
    "check_layers",
    "convert",
    "difference",
    "dry_run",
    "engine",
    "evaluation_copy",
    "exact",
    "executed",
    "executed_bits",
    "explained",
    "fuse",
    "fusion_difference",
    "grid",
    "highest_activation",
    "layers",
    "narrow",
    "prepare",
    "read_qparams",
    "require",
    "sharing_copy",
    "skeleton",
    "supported",
]

logger = logging.getLogger(__name__)
# Enough to tell which of two grids is the coarser for a layer.
NOISE_IMAGES = 16
say_once_silently()


def fuse(module: nn.Module, flow: Flow, fusion: bool, example: Tensor) -> nn.Module:
    """A copy of a float model in the form that `flow` quantizes, in evaluation mode; it computes the same.

    eager: Conv→BN(→ReLU) chains fused unless `fusion` is false; fx: traced, every BatchNorm after a convolution folded;
    dynamic: as it is. example: float32 [n, 3, H, W]. Raises InputError where the flow can't take the model.
    """
    if flow is Flow.eager:
        return eager.fuse(module, fusion, example)
    if flow is Flow.fx:
        return fx.fuse(module, example)
    return evaluation_copy(module, example)


def prepare(
    fused: nn.Module, flow: Flow, qconfig: QConfig, observer: Observer, engine_name: Engine, example: Tensor
) -> nn.Module:
    """A copy of a fused model with torch's observers where `flow` puts them; `qconfig.overflow` must be resolved."""
    with engine(engine_name):
        if flow is Flow.dynamic:
            return dynamic.prepare(fused, qconfig)
        of_flow = eager.prepare if flow is Flow.eager else fx.prepare
        prepared = of_flow(fused, qconfig, observer, engine_name, example)
        fix_fewer_levels(prepared, highest_activation(qconfig))
        return prepared


def narrow(
    prepared: nn.Module, flow: Flow, qconfig: QConfig, engine_name: Engine, target: Target, images: Tensor
) -> tuple[nn.Module, tuple[Narrowed, ...]]:
    """A calibrated model with 7 bits on one side of every layer whose 16-bit sums saturate on `images`, with this
    machine's kernels; or, where these are exact and `target` is a CPU without VNNI, with emulated ones.

    images: float32 [n, 3, H, W], some of the calibration images. Returns a copy, and what was narrowed.
    """
    converted = convert(prepared, flow, engine_name)
    signature = kernels.probe()
    kinds = kernels.overflowing_kinds(qconfig, engine_name, flow, Target.native, signature)
    emulate = target is Target.avx2 and not signature.dense_saturates(engine_name, qconfig.weight.scheme)
    if emulate:
        kinds |= kernels.overflowing_kinds(qconfig, engine_name, flow, target, signature)
    if not emulation.at_risk(converted, engine_name, kinds):
        return prepared, ()
    if emulate:
        rows = emulation.layer_by_layer(
            emulation.with_emulated_sums(converted, engine_name), converted, [images], engine_name
        )
    else:
        rows = emulation.layer_by_layer(converted, exact(prepared, flow), [images], engine_name)
    risky = [row.name for row in rows if row.saturates]
    return narrowing.narrow(prepared, risky, qconfig, images[:NOISE_IMAGES]) if risky else (prepared, ())


def convert(prepared: nn.Module, flow: Flow, engine_name: Engine) -> nn.Module:
    """A converted copy, packed for `engine_name`; run it under the same engine only."""
    with engine(engine_name):
        if flow is Flow.dynamic:
            return dynamic.convert(prepared)
        converted = eager.convert(prepared) if flow is Flow.eager else fx.convert(prepared)
        # torch makes what stays in FP32 anew, with gradients, which TorchScript doesn't take.
        held = scales_in_state(hold(converted.requires_grad_(False), highest_observed(prepared)))
        return contiguous_clamps(without_strides(held, engine_name), engine_name)


def exact(prepared: nn.Module, flow: Flow) -> nn.Module:
    """A converted copy whose convolutions and linear layers are qnnpack's, with exact sums, on every engine.

    To be run under the engine that it is compared with: all else is then the same. (Under qnnpack torch 2.13 clamps
    tensors in channels-last as if they weren't, so that after a ReLU6 nothing is right.)
    """
    converted = convert(prepared, flow, Engine.qnnpack)
    fit_biases(converted)
    return converted


def skeleton(fused: nn.Module, flow: Flow, qconfig: QConfig, engine_name: Engine, example: Tensor) -> nn.Module:
    """A converted model with the structure that these settings give and meaningless ranges, to load a state_dict into.

    fused: as from `fuse`. Its weights don't matter; those of layers that stay in FP32 are the skeleton's, too, until
    others are assigned.
    """
    minmax = Observer(ActivationObserver.minmax)
    # The structure doesn't depend on where ranges are taken.
    plain = dataclasses.replace(qconfig, range_after_clamp=False)
    prepared = prepare(fused, flow, plain, minmax, engine_name, example)
    for watching in observers(prepared).values():
        if records_range(watching):
            watching(torch.tensor([0.0, 1.0]))
    return convert(prepared, flow, engine_name)


def dry_run(
    module: nn.Module,
    flow: Flow,
    fusion: bool,
    qconfig: QConfig,
    observer: Observer,
    engine_name: Engine,
    example: Tensor,
    image: str = "the example",
) -> None:
    """Take a model through the whole flow, so that what can't work is known before any work.

    example: float32 [n, 3, H, W], n ≥ 1; image: the name of the first, for a sentence. Raises InputError that names the
    module where it fails and what would work.
    """
    one = example[:1]
    logits = float_checks.checked(module, one, image)

    def through(flow: Flow, fusion: bool, engine_name: Engine) -> None:
        # The eager flow's INT8 layers keep hooks, and those that fusing loses are found by what they change.
        if flow is Flow.fx and (reason := float_checks.hooked(module, one)):
            raise InputError(reason)
        fused = fuse(module, flow, fusion, one)
        with torch.inference_mode():
            same = difference(logits, fused(one)) <= TOLERANCE_UNTRAINED
        if not same:
            raise InputError(explained(module, fused, flow, one))
        prepared = prepare(fused, flow, qconfig, observer, engine_name, one)
        if flow is not Flow.dynamic:
            calibrate(prepared, [one], lambda number: image)
        converted = convert(prepared, flow, engine_name)
        with engine(engine_name):
            # Two images: with one, a batch that is taken for channels goes unnoticed.
            run_or_refuse(converted, flow, torch.cat([one, one]))
        highest = highest_code(converted)
        if highest < HIGHEST and (operator := beyond(converted, engine_name, one, highest)):
            raise InputError(
                f"flow={flow.value} can't keep what {operator} gives within qconfig.activation.bits="
                f"{qconfig.activation.bits}, for torch's kernel knows 8 alone: call it as a module of torch.nn, or "
                "use qconfig.activation.bits=8"
            )
        if not any(layer.int8 for layer in layers(converted, flow, engine_name)):
            raise InputError(f"flow={flow.value} finds no layer in {type(module).__name__} that it could quantize")
        check_layers(fused, converted, flow, engine_name, one, read_qparams(prepared))

    def takes(flow: Flow, fusion: bool, engine_name: Engine) -> bool:
        try:
            with unprinted():
                through(flow, fusion, engine_name)
        except Exception as error:  # whatever stops it, it is not to be recommended
            logger.debug(
                "flow=%s engine=%s does not take the model either: %s", flow.value, engine_name.value, one_line(error)
            )
            return False
        return True

    try:
        with unprinted():
            through(flow, fusion, engine_name)
    except NotFinite as error:
        raise InputError(str(error)) from error
    except Exception as error:
        # What torch raises on a model that it can't quantize is of many classes.
        sentence = float_checks.cause(module, one)
        sentence = sentence or (str(error) if isinstance(error, QexpError) else _of_torch(error, module, flow, one))
        others = {
            **{f"engine={other.value}": (flow, fusion, other) for other in supported()[:1]},
            "flow=eager": (Flow.eager, True, engine_name),
            "fusion=false" if flow is Flow.eager else "flow=eager fusion=false": (Flow.eager, False, engine_name),
            "flow=fx": (Flow.fx, True, engine_name),
            "flow=dynamic": (Flow.dynamic, True, engine_name),
        }
        tried = (flow, fusion or flow is not Flow.eager, engine_name)
        working = [name for name, other in others.items() if other != tried and takes(*other)]
        advice = f"this model works with {' or with '.join(working)}" if working else "no flow takes this model"
        raise InputError(f"{sentence.rstrip('.')}; {advice}.") from error


def _of_torch(error: Exception, module: nn.Module, flow: Flow, image: Tensor) -> str:
    reason = float_checks.squeezed(module, image) or first_line(error)
    return f"flow={flow.value} can't quantize {type(module).__name__}: {reason}"
