"""Every model of the README goes through both flows at the sizes of the README's data sets, untrained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qexp import quantize
from qexp.config import schema
from qexp.config.composition import CONF
from qexp.config.schema import Engine, FlowName
from qexp.models import float_model
from qexp.pipeline.prepare import quantization_spec, resolved
from qexp.quantize import FLOWS, QuantizationSpec

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "custom")
SIZES = [32, 224]  # of the data sets that are shipped, and of the README's folder of images


@pytest.mark.slow
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_every_data_set(
    model: str, size: int, flow: FlowName, composed: Callable[..., schema.Config]
) -> None:
    config = composed(f"model={model}", f"flow={flow.value}")
    module = float_model.check_model(config.model, 10, (3, size, size))
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    quantize.dry_run(module, FLOWS[flow], QuantizationSpec(resolved(config), config.observer, Engine.x86), example)


def test_a_shipped_model_that_was_refused_is_taken(composed: Callable[..., schema.Config]) -> None:
    config = composed("model=shufflenet_v2")
    module = float_model.check_model(config.model, 10, (3, 32, 32))
    quantize.dry_run(module, FLOWS[config.flow], quantization_spec(config), torch.ones(1, 3, 32, 32))
