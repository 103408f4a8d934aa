"""The guard `overflow=layers` on a converted model, and the model with exact accumulators to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from qexp.config.schema import Engine, Target
from qexp.quantize.flow import Prepared, QuantizedModel
from qexp.quantize.graph.exported import is_program
from qexp.quantize.saturation import kernels
from qexp.quantize.saturation.accumulators import LayerSaturation
from qexp.quantize.saturation.kernels import Kernels
from qexp.quantize.saturation.narrowing import ReducedRange
from qexp.quantize.saturation.programs import SaturatingProgram, reduce_range_of_program

# Enough to tell which of two grids is the coarser for a layer.
NOISE_IMAGES = 16


def reduce_range(
    model: QuantizedModel, target: Target, images: Tensor, others: Sequence[Kernels] = ()
) -> tuple[QuantizedModel, tuple[ReducedRange, ...]]:
    """Reduce one side to 7 bits in every layer whose 16-bit accumulators saturate on `images`.

    Saturation is observed with this machine's kernels or, if these are exact and `target` is a CPU without VNNI, with
    emulated ones; in the kernels of other libraries that execute the model, it is emulated. images: float32
    [n, 3, H, W], some of the calibration images. Returns a new model and the layers whose range was reduced; the model
    itself and () if nothing saturates.
    """
    program = is_program(model.module)
    emulated = _in_program if program else _emulated
    elsewhere = (emulated(model, one.order, one.here | one.there, images) for one in others)
    rows = itertools.chain(() if program else _in_torch(model, target, images), *elsewhere)
    risky = dict.fromkeys(row.name for row in rows if row.saturates)
    if not risky:
        return model, ()
    module, reduced = _reduced(model, risky, images[:NOISE_IMAGES])
    return model.flow.convert(replace(model.prepared, module=module)), reduced


def _reduced(
    model: QuantizedModel, risky: Collection[str], images: Tensor
) -> tuple[nn.Module, tuple[ReducedRange, ...]]:
    """The prepared model with one side of the layers `risky` reduced, and which side that is."""
    prepared, qconfig = model.prepared.module, model.qconfig
    if is_program(model.module):
        return reduce_range_of_program(cast(fx.GraphModule, prepared), risky, qconfig, images)
    from qexp.quantize.torch_backend.reduced_range import reduce_range_of_layers

    return reduce_range_of_layers(prepared, risky, qconfig, images)


def _in_torch(model: QuantizedModel, target: Target, images: Tensor) -> Iterable[LayerSaturation]:
    """Compare the layers in torch's own kernels with exact ones; () where they can't saturate."""
    from qexp.quantize.torch_backend import emulation

    qconfig, engine, flow, signature = model.qconfig, model.engine, model.flow.name, kernels.probe()
    kinds = kernels.overflowing_kinds(qconfig, engine, flow, Target.native, signature)
    if target is Target.avx2 and not signature.dense_saturates(engine, qconfig.weight.scheme):
        return _emulated(
            model, engine, kinds | kernels.overflowing_kinds(qconfig, engine, flow, target, signature), images
        )
    if not emulation.at_risk(model.module, engine, kinds):
        return ()
    return emulation.layer_by_layer(model.module, exact(model.prepared), [images], engine)


def _emulated(
    model: QuantizedModel, order: Engine, kinds: Collection[str], images: Tensor
) -> Iterable[LayerSaturation]:
    """Compare layers of these kinds, with emulated accumulators, with exact ones; () where they can't saturate."""
    from qexp.quantize.torch_backend import emulation

    if not emulation.at_risk(model.module, order, kinds):
        return ()
    emulated = emulation.with_emulated_accumulators(model.module, order)
    rows = emulation.layer_by_layer(emulated, exact(model.prepared), [images], model.engine)
    return [row for row in rows if row.kind in kinds]


def _in_program(
    model: QuantizedModel, order: Engine, kinds: Collection[str], images: Tensor
) -> Iterable[LayerSaturation]:
    """The same of a Q/DQ program."""
    emulated = SaturatingProgram(cast(fx.GraphModule, model.module), order, kinds, saturating=False)
    with torch.inference_mode():
        for part in images.split(NOISE_IMAGES):
            emulated(part)
    return emulated.found.values()


def exact(prepared: Prepared) -> nn.Module:
    """Return a converted copy whose convolutions and linear layers are qnnpack's, with exact accumulators.

    Run it under the engine that it is compared with, so that everything else is the same. (Under qnnpack, torch 2.13
    clamps channels-last tensors as if they were contiguous, so that everything after a ReLU6 is wrong.)
    """
    from qexp.quantize.torch_backend.qnnpack_biases import fit_biases

    for_qnnpack = replace(prepared, spec=replace(prepared.spec, engine=Engine.qnnpack))
    converted = prepared.flow.convert(for_qnnpack).module
    fit_biases(converted)
    return converted
