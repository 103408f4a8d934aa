"""The guard `overflow=layers` on a converted model, and the model with exact accumulators to compare with."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from qexp.config.schema import Engine, Target
from qexp.quantize.flow import Prepared, QuantizedModel
from qexp.quantize.saturation import emulation, kernels
from qexp.quantize.saturation.reduced_range import ReducedRange, reduce_range_of_layers
from qexp.quantize.torch_backend.qnnpack_biases import fit_biases

# Enough to tell which of two grids is the coarser for a layer.
NOISE_IMAGES = 16


def reduce_range(
    model: QuantizedModel, target: Target, images: Tensor
) -> tuple[QuantizedModel, tuple[ReducedRange, ...]]:
    """Reduce one side to 7 bits in every layer whose 16-bit accumulators saturate on `images`.

    Saturation is observed with this machine's kernels or, if these are exact and `target` is a CPU without VNNI, with
    emulated ones. images: float32 [n, 3, H, W], some of the calibration images. Returns a new model and the layers
    whose range was reduced; the model itself and () if nothing saturates.
    """
    qconfig, engine, flow, signature = model.qconfig, model.engine, model.flow.name, kernels.probe()
    kinds = kernels.overflowing_kinds(qconfig, engine, flow, Target.native, signature)
    emulate = target is Target.avx2 and not signature.dense_saturates(engine, qconfig.weight.scheme)
    if emulate:
        kinds |= kernels.overflowing_kinds(qconfig, engine, flow, target, signature)
    if not emulation.at_risk(model.module, engine, kinds):
        return model, ()
    if emulate:
        emulated = emulation.with_emulated_accumulators(model.module, engine)
        rows = emulation.layer_by_layer(emulated, model.module, [images], engine)
    else:
        rows = emulation.layer_by_layer(model.module, exact(model.prepared), [images], engine)
    risky = [row.name for row in rows if row.saturates]
    if not risky:
        return model, ()
    module, reduced = reduce_range_of_layers(model.prepared.module, risky, qconfig, images[:NOISE_IMAGES])
    return model.flow.convert(replace(model.prepared, module=module)), reduced


def exact(prepared: Prepared) -> nn.Module:
    """Return a converted copy whose convolutions and linear layers are qnnpack's, with exact accumulators.

    Run it under the engine that it is compared with, so that everything else is the same. (Under qnnpack, torch 2.13
    clamps channels-last tensors as if they were contiguous, so that everything after a ReLU6 is wrong.)
    """
    for_qnnpack = replace(prepared, spec=replace(prepared.spec, engine=Engine.qnnpack))
    converted = prepared.flow.convert(for_qnnpack).module
    fit_biases(converted)
    return converted
