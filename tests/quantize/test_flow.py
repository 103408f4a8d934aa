"""The interface of every flow, and that no other code depends on which flow it is."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qexp
from qexp import quantize
from qexp.config.schema import Engine, FlowName, Overflow, Target
from qexp.models import architectures
from qexp.quantize import FLOWS, QuantizedModel
from qexp.runtimes.eager import Eager
from tests.helpers.quantizable import Chain, Plain, images, settings, spec, trained

PACKAGE = Path(qexp.__file__).parent
TWO = images(2)


def test_every_flow_of_the_settings_is_registered_under_its_name() -> None:
    assert set(FLOWS) == set(FlowName)
    assert all(flow.name is name for name, flow in FLOWS.items())


def asks_which_flow(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in list(FlowName):
        return ast.unparse(node.value).rpartition(".")[2] == "FlowName"
    values = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return any(isinstance(value, ast.Constant) and value.value in ("fx", "pt2e", "dynamic") for value in values)


def test_nothing_but_a_flow_itself_asks_which_flow_it_is() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.parent != PACKAGE / "quantize" / "flows":
            found = [ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if asks_which_flow(node)]
            assert found == [], file


def quantized(net: nn.Module, flow: FlowName, engine: Engine = Engine.x86, **wanted: str) -> QuantizedModel:
    asked = spec(settings(**wanted), engine=engine)  # type: ignore[arg-type]
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(trained(net), asked, TWO), asked, TWO)
    if FLOWS[flow].calibrates:
        quantize.calibrate(prepared, images(16, seed=3).split(8))
    return FLOWS[flow].convert(prepared)


@pytest.mark.parametrize("flow", FlowName)
def test_a_quantized_model_knows_what_it_was_made_of(flow: FlowName) -> None:
    for package in flow.packages:
        pytest.importorskip(package)
    model = quantized(Chain(), flow)
    assert (model.flow, model.engine, model.qconfig) == (FLOWS[flow], Engine.x86, settings())
    assert any(layer.int8 for layer in model.layers)
    assert bool(model.qparams) == model.flow.calibrates
    with torch.inference_mode():
        assert torch.equal(model.fused(TWO), model.prepared.fused(TWO))


def test_a_model_that_nothing_saturates_in_is_handed_on_as_it_is() -> None:
    model = quantized(Chain(), FlowName.fx, overflow="layers")
    exact = replace(model, prepared=replace(model.prepared, spec=replace(model.prepared.spec, engine=Engine.qnnpack)))
    assert model.qconfig.overflow is Overflow.layers
    assert quantize.reduce_range(exact, Target.native, TWO) == (exact, ())


NETS: dict[str, Callable[[], nn.Module]] = {"tiny": architectures.tiny, "chain": Chain, "plain": Plain}
CASES = [
    ("tiny", FlowName.eager),
    ("chain", FlowName.eager),
    ("plain", FlowName.fx),
    ("tiny", FlowName.fx),
    ("tiny", FlowName.dynamic),
]


@pytest.mark.parametrize("engine", [Engine.x86, Engine.qnnpack])
@pytest.mark.parametrize(("name", "flow"), CASES)
def test_a_blank_copy_computes_nothing_until_it_is_given_a_state(
    name: str, flow: FlowName, engine: Engine, tmp_path: Path
) -> None:
    model = quantized(NETS[name](), flow, engine)
    saved = Eager().export(model.module, TWO, tmp_path / "int8.pt")
    blank = quantize.blank_copy(model)
    for module in blank.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert not any(tensor.any() for tensor in held)
        assert vars(module).get("scale", 1.0) == 1
        assert vars(module).get("zero_point", 0) == 0
    with quantize.engine(engine), torch.inference_mode():
        expected = model.module(TWO)
        assert torch.equal(Eager().load(saved, lambda: blank, engine)(TWO), expected)
        assert torch.equal(model.module(TWO), expected)  # which shares nothing with its copy


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_a_scale_that_a_saved_state_lacks_shows(flow: FlowName) -> None:
    """As torch's own ELU leaves it out."""
    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ELU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)), flow)
    activation = next(module for module in model.module.modules() if isinstance(module, torch.ao.nn.quantized.ELU))
    scale = float(activation.scale)
    del activation._buffers["scale"]
    activation.scale = scale
    blank = quantize.blank_copy(model)
    blank.load_state_dict(model.module.state_dict(), assign=True)
    with quantize.engine(Engine.x86), torch.inference_mode():
        assert not torch.equal(blank(TWO), model.module(TWO))
