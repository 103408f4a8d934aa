"""From a float model to an INT8 one, by the flows of torch.ao and torchao.

flow = FLOWS[config.flow]
fused = flow.fuse(model, spec, example)
prepared = flow.prepare(fused, spec, example)
calibrate(prepared, batches)
int8 = flow.convert(prepared)
"""

from __future__ import annotations

from qexp.quantize.calibration.cached import calibrate_once
from qexp.quantize.calibration.grid import SAFE_CODE, Side, asked_grid, executed_bits
from qexp.quantize.calibration.passes import calibrate
from qexp.quantize.dry_run import dry_run
from qexp.quantize.flow import Prepared, QuantizationSpec, QuantizedModel
from qexp.quantize.flows import FLOWS
from qexp.quantize.graph.copies import evaluation_copy, sharing_copy
from qexp.quantize.inspection.executed_operators import executed
from qexp.quantize.inspection.float_model_checks import TOLERANCE, difference
from qexp.quantize.inspection.fusion_check import explained
from qexp.quantize.inspection.int8_model import check_layers, layer_fidelity
from qexp.quantize.saturation.guard import exact, reduce_range
from qexp.quantize.saturation.narrowing import ReducedRange
from qexp.quantize.simulation import simulated
from qexp.quantize.skeletons import blank_copy, skeleton
from qexp.quantize.torch_backend.deprecations import silence_first_warning
from qexp.quantize.torch_backend.engines import engine, require, supported

__all__ = [
    "FLOWS",
    "SAFE_CODE",
    "TOLERANCE",
    "Prepared",
    "QuantizationSpec",
    "QuantizedModel",
    "ReducedRange",
    "Side",
    "asked_grid",
    "blank_copy",
    "calibrate",
    "calibrate_once",
    "check_layers",
    "difference",
    "dry_run",
    "engine",
    "evaluation_copy",
    "exact",
    "executed",
    "executed_bits",
    "explained",
    "layer_fidelity",
    "reduce_range",
    "require",
    "sharing_copy",
    "simulated",
    "skeleton",
    "supported",
]

silence_first_warning()
