"""The fidelity of layers: against numpy on captured tensors, and against what was done to a layer on purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.quantize import FLOWS
from qexp.quantize.inspection import parts
from qexp.quantize.inspection.int8_model import layer_fidelity
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.records import Fidelity, QParams
from tests.helpers.quantizable import (
    Again,
    Chain,
    Plain,
    Squeezed,
    StubbedTiny,
    Twice,
    assembled,
    images,
    settings,
    spec,
    trained,
)

TWO = images(2)
BOTH = [FlowName.eager, FlowName.fx]


@dataclass(frozen=True, eq=False)
class Case:
    fused: nn.Module
    int8: nn.Module
    qparams: dict[str, QParams]
    flow: FlowName
    engine: Engine

    def rows(self, batches: Iterable[Tensor]) -> tuple[Fidelity, ...]:
        return layer_fidelity(assembled(self.fused, self.int8, self.flow, self.engine), batches)

    def by_name(self, batches: Iterable[Tensor]) -> dict[str, Fidelity]:
        return {row.name: row for row in self.rows(batches)}

    def int8_layers(self) -> list[str]:
        return [layer.name for layer in torch_layers.layers(self.int8, FLOWS[self.flow], self.engine) if layer.int8]


def case(
    net: nn.Module,
    flow: FlowName,
    fusion: bool = True,
    engine: Engine = Engine.x86,
    amplitude: float = 1.0,
    **wanted: Any,
) -> Case:
    """A converted model whose 16-bit accumulators can't saturate, calibrated on images of this amplitude."""
    fused = FLOWS[flow].fuse(trained(net), spec(fusion=fusion), TWO)
    qconfig = settings(**{"overflow": "activations", **wanted})
    prepared = FLOWS[flow].prepare(fused, spec(qconfig, engine=engine), TWO)
    quantize.calibrate(prepared, [images(8, seed=3) * amplitude])
    qparams = torch_layers.read_qparams(prepared.module)
    return Case(fused, FLOWS[flow].convert(prepared).module, qparams, flow, engine)


def decibels(expected: np.ndarray, actual: np.ndarray) -> float:
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    return float(10 * np.log10((expected**2).sum() / ((expected - actual) ** 2).sum()))


def captured(model: nn.Module, batch: Tensor, engine: Engine) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Input and output of every call of every module, by the module's name."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Any:
        return lambda m, inputs, output: found.setdefault(name, []).append((inputs[0].clone(), output.clone()))

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if name]
    with quantize.engine(engine), torch.inference_mode():
        model(batch)
    for handle in handles:
        handle.remove()
    return found


# Every INT8 output of `StubbedTiny` in the eager flow; in fx the same tensors are called otherwise where no module is.
TINY = {
    "quant": "x",
    "conv1": "conv1",
    "blocks.0.conv1": "blocks.0.conv1",
    "blocks.0.conv2": "blocks.0.conv2",
    "blocks.0.add_relu": "relu",
    "blocks.1.conv1": "blocks.1.conv1",
    "blocks.1.conv2": "blocks.1.conv2",
    "blocks.1.downsample.0": "blocks.1.downsample.0",
    "blocks.1.add_relu": "relu_1",
    "fc": "fc",
}


@pytest.mark.parametrize("engine", quantize.supported())
def test_every_number_is_that_of_brute_force(engine: Engine) -> None:
    # Calibrated on weaker images than those that are looked at, so that a part of each tensor is clipped.
    tiny = case(StubbedTiny(), FlowName.eager, engine=engine, amplitude=0.3)
    batch = images(6, seed=4)
    rows = tiny.by_name([batch])
    assert list(rows) == list(TINY)
    floats, int8 = (captured(model, batch, engine) for model in (tiny.fused, tiny.int8))
    for name, row in rows.items():
        inner = f"{name}.activation_post_process" if "add" in name else name
        (given, expected), (asked, actual) = floats[inner][0], int8[inner][0]
        scale, zero_point = actual.q_scale(), actual.q_zero_point()
        low, high = (0 - zero_point) * scale, (255 - zero_point) * scale
        outside = (expected.numpy() < low - scale) | (expected.numpy() > high + scale)
        assert row.scale == scale
        assert row.sqnr_db == pytest.approx(decibels(expected.numpy(), actual.dequantize().numpy()), abs=0.02)
        assert row.clipped == pytest.approx(outside.mean(), abs=1e-3)
        if "conv" in name or "downsample" in name or name == "fc":
            on_grid = torch.quantize_per_tensor(given, asked.q_scale(), asked.q_zero_point(), torch.quint8)
            with quantize.engine(engine), torch.inference_mode():
                own = tiny.int8.get_submodule(name)(on_grid).dequantize()
            assert row.own_sqnr_db == pytest.approx(decibels(expected.numpy(), own.numpy()), abs=0.02)
            assert row.weight_sqnr_db == pytest.approx(weight_decibels(tiny, name), abs=1e-3)
        else:
            assert row.weight_sqnr_db is None
    assert max(row.clipped for row in rows.values()) > 0.1


def weight_decibels(one: Case, name: str) -> float:
    layer = one.fused.get_submodule(name)
    weight = (layer[0] if isinstance(layer, nn.Sequential) else layer).weight.numpy()
    q = one.qparams[f"{name}.weight"]
    scale, zero_point = (v.reshape(-1, *[1] * (weight.ndim - 1)) for v in (q.scale, q.zero_point))
    on_grid = np.clip(np.round(weight / scale) + zero_point, q.qmin, q.qmax)
    return decibels(weight, (on_grid - zero_point) * scale)


def test_an_addition_by_itself_is_that_of_the_quantized_operands() -> None:
    tiny = case(StubbedTiny(), FlowName.eager)
    batch = images(6, seed=4)
    floats, int8 = (captured(model, batch, Engine.x86) for model in (tiny.fused, tiny.int8))
    operands = ("blocks.0.conv2", "conv1")
    on_grid = [
        torch.quantize_per_tensor(floats[n][0][1], int8[n][0][1].q_scale(), int8[n][0][1].q_zero_point(), torch.quint8)
        for n in operands
    ]
    with quantize.engine(Engine.x86):
        own = tiny.int8.get_submodule("blocks.0.add_relu").add_relu(*on_grid).dequantize()
    expected = floats["blocks.0.add_relu.activation_post_process"][0][1]
    row = tiny.by_name([batch])["blocks.0.add_relu"]
    assert row.own_sqnr_db == pytest.approx(decibels(expected.numpy(), own.numpy()), abs=0.02)
    assert row.kind == "add"


def test_both_flows_give_the_same_numbers_for_the_same_model() -> None:
    batch = images(6, seed=4)
    eager, fx = (case(StubbedTiny(), flow).by_name([batch]) for flow in BOTH)
    assert {TINY[name] for name in eager} == set(fx)
    for name, row in eager.items():
        counterpart = fx[TINY[name]]
        assert (row.kind, row.scale) == (counterpart.kind, pytest.approx(counterpart.scale))
        assert row.sqnr_db == pytest.approx(counterpart.sqnr_db, abs=0.1)
        assert row.own_sqnr_db == pytest.approx(counterpart.own_sqnr_db, abs=0.1)


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("name", ["conv1", "blocks.1.conv2", "blocks.1.downsample.0", "fc"])
def test_a_layer_with_ruined_weights_is_the_worst_by_itself(flow: FlowName, name: str) -> None:
    tiny = case(StubbedTiny(), flow)
    module = tiny.int8.get_submodule(name)
    module = getattr(module, "conv", module)
    with quantize.engine(Engine.x86):
        weight, bias = module._weight_bias()
        scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        negative = torch.quantize_per_channel(-weight.dequantize(), scales, zero_points, 0, torch.qint8)
        module.set_weight_bias(negative, bias)
    rows = tiny.rows([images(6, seed=4)])
    found = min(rows, key=lambda row: math.inf if row.own_sqnr_db is None else row.own_sqnr_db)
    assert found.name == name
    # The error of −w is 2w, four times the power (and the grid has no +128).
    assert found.weight_sqnr_db == pytest.approx(10 * math.log10(1 / 4), abs=0.02)
    assert found.own_sqnr_db < 10
    assert all(row.own_sqnr_db > 20 for row in rows if row.name != name)


@pytest.mark.parametrize("flow", BOTH)
def test_how_images_are_cut_into_batches_does_not_matter(flow: FlowName, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, batch = case(StubbedTiny(), flow), images(7, seed=4)
    whole = tiny.rows([batch])
    monkeypatch.setattr(parts, "_PIXELS", 3 * 16 * 16)
    for cut in ([batch], batch.split(1), batch.split(5)):
        for row, other in zip(tiny.rows(cut), whole, strict=True):
            assert (row.name, row.kind, row.scale) == (other.name, other.kind, other.scale)
            assert row.sqnr_db == pytest.approx(other.sqnr_db, abs=0.05)
            assert row.own_sqnr_db == pytest.approx(other.own_sqnr_db, abs=0.05)
            assert row.weight_sqnr_db == other.weight_sqnr_db
            assert row.clipped == pytest.approx(other.clipped, abs=1e-4)


# ------------------------------------------------------------------------------------------------ who is in it


NETS = [
    (StubbedTiny, FlowName.eager, True),
    (StubbedTiny, FlowName.eager, False),
    (StubbedTiny, FlowName.fx, True),
    (Chain, FlowName.eager, True),
    (Chain, FlowName.eager, False),
    (Chain, FlowName.fx, True),
    (Plain, FlowName.fx, True),
    (Squeezed, FlowName.fx, True),
    (Twice, FlowName.eager, True),
    (Twice, FlowName.fx, True),
]


@pytest.mark.parametrize(("net", "flow", "fusion"), NETS)
def test_no_int8_layer_is_left_out(net: type[nn.Module], flow: FlowName, fusion: bool) -> None:
    one = case(net(), flow, fusion)
    rows = one.by_name([images(3, seed=4)])
    layers = {layer.name: layer.kind for layer in torch_layers.layers(one.int8, FLOWS[flow], one.engine) if layer.int8}
    assert layers.items() <= {name: row.kind for name, row in rows.items()}.items()
    assert len(rows) == len(one.rows([images(3, seed=4)]))
    # Whatever it is called, it is called so in the QParams.
    assert set(rows) <= set(one.qparams)
    assert all(row.own_sqnr_db is not None and math.isfinite(row.own_sqnr_db) for row in rows.values())
    assert all(rows[name].weight_sqnr_db > 30 for name, kind in layers.items() if kind != "batchnorm")


def test_operations_between_modules_are_in_the_order_of_execution() -> None:
    rows = case(Squeezed(), FlowName.fx).rows([images(3, seed=4)])
    assert [(row.name, row.kind) for row in rows] == [
        ("x", "quantize"),
        ("expand.0", "pointwise"),
        ("expand.2", "hardswish"),
        ("depthwise.0", "depthwise"),
        ("squeeze", "pointwise"),
        ("excite", "pointwise"),
        ("gate", "hardsigmoid"),
        ("mul", "mul"),
        ("project", "pointwise"),
        ("grouped", "grouped"),
        ("add", "add"),
        ("fc", "linear"),
    ]
    # 1.0, which the gate often gives, is a step above the highest value of its fixed grid.
    assert rows[6].clipped == 0


def test_a_layer_that_is_called_twice_is_one_row_over_both_calls() -> None:
    one, batch = case(Twice(), FlowName.eager), images(5, seed=4)
    floats, inside = (captured(model, batch, Engine.x86) for model in (one.fused, one.int8))
    expected = np.stack([output.numpy() for _, output in floats["conv"]])
    actual = np.stack([output.dequantize().numpy() for _, output in inside["module.conv"]])
    assert len(expected) == 2
    rows = one.by_name([batch])
    assert rows["conv"].sqnr_db == pytest.approx(decibels(expected, actual), abs=0.02)
    assert [row.name for row in one.rows([batch])] == ["quant", "stem", "conv", "add", "fc"]


# ------------------------------------------------------------------------------------------------ clamps


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("range_after_clamp", [True, False])
def test_what_a_clamp_takes_away_is_no_loss(flow: FlowName, range_after_clamp: bool) -> None:
    net = trained(Chain(nn.ReLU6))
    net.features[1].weight.mul_(20)  # far beyond 6 on both sides
    fused = FLOWS[flow].fuse(net, spec(), TWO)
    prepared = FLOWS[flow].prepare(
        fused, spec(settings(overflow="activations", range_after_clamp=range_after_clamp)), TWO
    )
    quantize.calibrate(prepared, [images(8, seed=3)])
    qparams, int8 = torch_layers.read_qparams(prepared.module), FLOWS[flow].convert(prepared).module
    rows = Case(fused, int8, qparams, flow, Engine.x86).by_name([images(8, seed=4)])
    assert rows["features.0"].clipped < 1e-3
    # With the values below 0 and above 6 in it, a grid that ends there would have 1 dB.
    assert rows["features.0"].sqnr_db > 15


def test_a_relu_that_works_in_place_changes_nothing() -> None:
    batch = images(5, seed=4)
    rows = []
    for inplace in (True, False):
        net = Chain()
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        rows.append(case(net, FlowName.eager, fusion=False).rows([batch]))
    assert rows[0] == rows[1]


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("flow", BOTH)
def test_the_models_are_left_as_they_were(flow: FlowName) -> None:
    tiny = case(StubbedTiny(), flow)
    with quantize.engine(Engine.x86), torch.inference_mode():
        before = tiny.int8(TWO)
        tiny.rows([TWO])
        assert torch.equal(tiny.int8(TWO), before)
    for module in [*tiny.fused.modules(), *tiny.int8.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "add_relu" not in module.__dict__


def test_no_images_is_an_error_and_the_dynamic_flow_has_no_scales() -> None:
    tiny = case(StubbedTiny(), FlowName.eager)
    with pytest.raises(ValueError, match="at least one image"):
        tiny.rows([])
    assert layer_fidelity(assembled(tiny.fused, tiny.int8, FlowName.dynamic), [TWO]) == ()


def test_each_call_of_a_module_is_a_tensor_of_its_own_in_fx() -> None:
    one = case(Again(), FlowName.fx)
    second, third = "hardswish_hardswish_1", "hardswish_hardswish_2"
    tensors = ["x", "one", "hardswish", "two", "mul", second, "relu", third, "relu_1", "mean", "fc"]
    assert [name for name in one.qparams if not name.endswith(".weight")] == tensors
    rows = one.by_name([images(4, seed=4)])
    assert list(rows) == [name for name in tensors if name != "mean"]  # which keeps the scale of what it reads
    for name, row in rows.items():
        # A number that is multiplied with goes into the scale: with minmax it is the one that its own observer finds.
        assert row.scale == pytest.approx(float(one.qparams[name].scale[0]))
    assert rows[second].scale > 2 * rows["hardswish"].scale
    assert all(row.own_sqnr_db is not None and row.own_sqnr_db > 15 for row in rows.values())


@pytest.mark.parametrize("join", [lambda x: x * 2, lambda x: x + x.flip(1)])
def test_a_relu_that_torch_takes_into_the_operation_before_it_has_a_row_without_weights(join: Any) -> None:
    class Joined(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu1(join(self.bn1(self.conv1(x))))
            return self.fc(x.mean((2, 3)))

    class WithRelu(Joined):
        def __init__(self) -> None:
            super().__init__()
            self.relu1 = nn.ReLU()

    one = case(WithRelu(), FlowName.fx)
    row = one.by_name([images(4, seed=5)])["relu1"]
    assert row.weight_sqnr_db is None
    assert 15 < row.sqnr_db < 60
