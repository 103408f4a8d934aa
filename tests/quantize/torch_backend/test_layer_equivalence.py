"""The check of layers: right models pass it, and what is done to one layer on purpose is found at that layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.quantized import FloatFunctional

from qexp import quantize
from qexp.config.schema import Config, Engine, FlowName
from qexp.errors import InputError, RunError
from qexp.models import architectures
from qexp.pipeline import run
from qexp.quantize import FLOWS, Prepared, QuantizedModel
from qexp.quantize.flows.fx import FxFlow
from qexp.quantize.saturation import kernels
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.quantize.torch_backend.layer_equivalence import Deviation, check_layers, layer_deviations
from tests.helpers.quantizable import (
    BY_TORCH,
    Again,
    Chain,
    Squeezed,
    Twice,
    assembled,
    images,
    settings,
    spec,
    trained,
)

BOTH = [FlowName.eager, FlowName.fx]


@dataclass(frozen=True, eq=False)
class Case:
    fused: nn.Module
    int8: nn.Module
    flow: FlowName
    engine: Engine
    prepared: nn.Module | None = None

    @property
    def model(self) -> QuantizedModel:
        return assembled(self.fused, self.int8, self.flow, self.engine, self.prepared)

    def deviations(self) -> dict[str, Deviation]:
        found = layer_deviations(self.model, images(3, seed=9))
        return {one.name: one for one in found}

    def fault(self) -> str:
        """The error message of the check; "" if it passes."""
        try:
            check_layers(self.model, images(3, seed=9))
        except RunError as error:
            return str(error)
        return ""


def case(net: nn.Module, flow: FlowName, engine: Engine = Engine.qnnpack, fusion: bool = True, **wanted: Any) -> Case:
    """Converted; 7-bit weights where nothing else is asked for, so that no 16-bit sum saturates."""
    few = images(4, seed=3)
    fused = FLOWS[flow].fuse(trained(net), spec(fusion=fusion), few)
    qconfig = settings(**{"weight_bits": 7, **wanted})
    prepared = FLOWS[flow].prepare(fused, spec(qconfig, engine=engine), few)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, [few])
    return Case(fused, FLOWS[flow].convert(prepared).module, flow, engine, prepared.module)


class Joined(nn.Module):
    """A stem, two branches that are concatenated, a shortcut, an activation of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 10)
        self.cat, self.add = FloatFunctional(), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.cat.cat([self.left(x), self.right(x)], 1)
        x = self.relu(self.add.add(x, y))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# ------------------------------------------------------------------------------------------------ right models pass


@pytest.mark.parametrize("engine", quantize.supported())
@pytest.mark.parametrize("flow", BY_TORCH)
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"granularity": "per_tensor", "activation_scheme": "symmetric", "weight_observer": "mse"},
        {"weight_bits": 2, "activation_bits": 2},
        {"weight_bits": 4, "activation_bits": 4, "weight_observer": "mse", "activation_scheme": "symmetric"},
        {"weight_scheme": "asymmetric"},
    ],
)
def test_a_right_model_passes_and_no_layer_is_off_by_more_than_rounding(
    engine: Engine, flow: FlowName, wanted: dict[str, Any]
) -> None:
    if engine is Engine.onednn and "weight_scheme" in wanted:
        wanted = {"weight_scheme": "symmetric"}  # it has no kernels for weights with a zero point
    for net in (architectures.tiny(), Joined()):
        one = case(net, flow, engine, **wanted)
        assert one.fault() == ""
        found = one.deviations()
        assert {layer.name for layer in torch_layers.layers(one.int8, FLOWS[flow], engine) if layer.int8} <= set(found)
        if flow is not FlowName.dynamic:
            # qnnpack rounds biases to whole numbers; everything else is rounded once.
            assert max(row.output for row in found.values()) < (1 if engine is Engine.qnnpack else 0.501)
        assert max(row.weight for row in found.values()) < 0.501


NETS: list[tuple[Callable[[], nn.Module], FlowName, bool]] = [
    (Chain, FlowName.eager, False),
    (Again, FlowName.fx, True),
    (Twice, FlowName.eager, True),
    (Twice, FlowName.fx, True),
    (Squeezed, FlowName.fx, True),
]


@pytest.mark.parametrize(("net", "flow", "fusion"), NETS)
def test_calls_of_one_module_shared_operations_and_fixed_grids_pass(
    net: Callable[[], nn.Module], flow: FlowName, fusion: bool
) -> None:
    assert case(net(), flow, Engine.fbgemm, fusion).fault() == ""


def test_models_are_left_as_they_were() -> None:
    for flow in BOTH:
        one = case(Joined(), flow)
        before = {name: value.clone() for name, value in one.fused.state_dict().items()}
        batch = images(2)
        with quantize.engine(one.engine), torch.inference_mode():
            expected = one.int8(batch)
            assert one.fault() == ""
            assert torch.equal(one.int8(batch), expected)
        assert all(torch.equal(value, before[name]) for name, value in one.fused.state_dict().items())
        for module in [*one.fused.modules(), *one.int8.modules()]:
            assert "forward" not in vars(module)
            assert "cat" not in vars(module) or not isinstance(module, FloatFunctional)


# ------------------------------------------------------------------------------------------------ wrong models don't


def repack(one: Case, name: str, weight: Callable[[Tensor], Tensor] | None, bias: Callable[[Tensor], Tensor]) -> None:
    """Give an INT8 layer another weight (a function of its quantized one) or another bias."""
    module = one.int8.get_submodule(name if one.flow is FlowName.fx else f"module.{name}")
    with quantize.engine(one.engine):
        own, own_bias = module._weight_bias()
        module.set_weight_bias(own if weight is None else weight(own), bias(own_bias))


def rescaled(weight: Tensor) -> Tensor:
    scales, zero_points = weight.q_per_channel_scales() * 1.1, weight.q_per_channel_zero_points()
    return torch._make_per_channel_quantized_tensor(weight.int_repr(), scales, zero_points, 0)


def without_a_channel(weight: Tensor) -> Tensor:
    codes = weight.int_repr().clone()
    codes[1] = 0
    return torch._make_per_channel_quantized_tensor(
        codes, weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), 0
    )


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("name", ["stem", "right", "fc"])
def test_weights_and_biases_are_those_of_the_float_layer(flow: FlowName, name: str) -> None:
    same: Callable[[Tensor], Tensor] = lambda bias: bias  # noqa: E731
    for weight, bias, says in [
        (rescaled, same, "holds weights"),
        (without_a_channel, same, "holds weights"),
        (None, lambda bias: bias * 1.01, "holds a bias"),
    ]:
        one = case(Joined(), flow)
        repack(one, name, weight, bias)
        assert f" {name} (" in one.fault()
        assert says in one.fault()


def test_weights_and_biases_of_dynamic_layers_are_looked_at_too() -> None:
    for weight, bias, says in [
        (without_a_channel, lambda bias: bias, "holds weights"),
        (None, lambda bias: bias * 1.01, "holds a bias"),
    ]:
        one = case(Joined(), FlowName.dynamic)
        assert one.fault() == ""
        assert one.deviations()["fc"].weight > 0.1
        module: Any = one.int8.get_submodule("fc")
        with quantize.engine(one.engine):
            own, own_bias = module._weight_bias()
            module.set_weight_bias(own if weight is None else weight(own), bias(own_bias))
        assert f" fc (Linear) {says}" in one.fault()


@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("name", ["stem", "act", "fc"])
def test_each_layer_gives_its_output_on_the_grid_that_calibration_found(flow: FlowName, name: str) -> None:
    one = case(Joined(), flow)
    one.int8.get_submodule(name if flow is FlowName.fx else f"module.{name}").scale *= 1.1  # type: ignore[union-attr, operator]
    assert f" {name} (" in one.fault()
    assert "where calibration found" in one.fault()


@pytest.mark.parametrize("flow", BOTH)
def test_another_padding_is_another_function(flow: FlowName) -> None:
    one = case(Joined(), flow)
    module = one.int8.get_submodule("right" if flow is FlowName.fx else "module.right")
    module.padding_mode, module._reversed_padding_repeated_twice = "reflect", (1, 1, 1, 1)
    with quantize.engine(one.engine):
        weight, bias = module._weight_bias()
        module.padding = (0, 0)
        module.set_weight_bias(weight, bias)
        module.padding = (1, 1)
    assert " right (Conv2d) has" in one.fault()


@pytest.mark.parametrize("flow", BOTH)
def test_an_activation_that_is_left_out_is_missed(flow: FlowName) -> None:
    one = case(Joined(), flow)
    one.int8.get_submodule("" if flow is FlowName.fx else "module").act = nn.Identity()  # type: ignore[assignment]
    # In a graph the node is still there; among modules the next layer reads what it should not.
    assert (" act (Identity) has" if flow is FlowName.fx else " left (Conv2d) reads") in one.fault()


def test_a_relu_that_is_left_out_is_missed_by_the_next_layer() -> None:
    one = case(Chain(), FlowName.eager, fusion=False, range_after_clamp=False)
    one.int8.module.features[5] = nn.Identity()  # type: ignore[index, union-attr]
    assert " features.6 (Conv2d) reads" in one.fault()


def node_of(one: Case, operation: str) -> fx.Node:
    graph: Any = one.int8.graph
    return next(node for node in graph.nodes if operation in str(node.target))


def test_a_wrong_order_and_a_lost_shortcut_are_found_where_they_are() -> None:
    class Functional(Joined):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            y = torch.cat([self.left(x), self.right(x)], 1)
            return self.fc((x + y).mean((2, 3)))

    right = case(Functional(), FlowName.fx)
    assert right.fault() == ""
    swapped = Case(right.fused, copy.deepcopy(right.int8), FlowName.fx, right.engine)
    node = node_of(swapped, "built-in method cat")
    node.args = (list(reversed(node.args[0])), 1)  # type: ignore[call-overload, arg-type]
    swapped.int8.recompile()  # type: ignore[operator]
    assert " cat (cat) reads" in swapped.fault()
    lost = Case(right.fused, copy.deepcopy(right.int8), FlowName.fx, right.engine)
    node = node_of(lost, "quantized.add")
    node.args = (node.args[0], node.args[0], *node.args[2:])
    lost.int8.recompile()  # type: ignore[operator]
    assert " add (add) reads" in lost.fault()


def test_codes_of_two_grids_that_are_put_together_are_found() -> None:
    """torch.cat takes the first tensor's grid, and clips the second."""

    class Bare(Joined):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            y = torch.cat([self.left(x), self.right(x)], 1)
            return self.fc(F.adaptive_avg_pool2d(self.act(y), 1).flatten(1))

    few = images(4, seed=3)
    net = trained(Bare())
    net.right.weight.mul_(4)
    # As if eager mode didn't refuse it.
    prepared = FLOWS[FlowName.eager].prepare(
        copy.deepcopy(net), spec(settings(weight_bits=7), engine=Engine.qnnpack), few
    )
    quantize.calibrate(prepared, [few])
    one = Case(net, FLOWS[FlowName.eager].convert(prepared).module, FlowName.eager, Engine.qnnpack)
    assert " act (Hardswish) reads" in one.fault()


def test_an_int8_kernel_that_computes_another_function_is_found() -> None:
    """torch's INT8 InstanceNorm takes the image's own statistics where the float module has running ones."""
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    norm.running_mean, norm.running_var = torch.full((8,), 0.7), torch.full((8,), 3.0)
    float_model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 8, 1)).eval()
    few = images(4, seed=3)
    prepared = FLOWS[FlowName.eager].prepare(copy.deepcopy(float_model), spec(settings(weight_bits=7)), few)
    quantize.calibrate(prepared, [few])
    int8 = FLOWS[FlowName.eager].convert(prepared).module
    wrong = Case(float_model, int8, FlowName.eager, Engine.x86)
    int8.module[1] = nnq.InstanceNorm2d(8, norm.weight, norm.bias, 0.03, 128)  # type: ignore[index, operator]
    assert " 1 (InstanceNorm2d) has" in wrong.fault()


def test_saturation_is_counted_apart() -> None:
    """Depthwise kernels of FBGEMM add up in 16 bits on every CPU of x86."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)
    ).eval()
    with torch.no_grad():
        net[2].weight.fill_(1.0)  # type: ignore[union-attr, operator]
        net[0].bias.fill_(50.0)  # type: ignore[union-attr, operator]
    few = images(4, seed=3)
    fused = FLOWS[FlowName.fx].fuse(net, spec(), few)
    prepared = FLOWS[FlowName.fx].prepare(fused, spec(settings(granularity="per_tensor"), engine=Engine.fbgemm), few)
    quantize.calibrate(prepared, [few])
    one = Case(fused, FLOWS[FlowName.fx].convert(prepared).module, FlowName.fx, Engine.fbgemm)
    assert one.fault() == ""
    saturates = "depthwise" in kernels.probe().saturating_kinds(Engine.fbgemm)
    assert (one.deviations()["2"].saturated > 0) == saturates


# ------------------------------------------------------------------------------------------------ where it is asked


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on a layer of what flow=fx converts gives half of what it should."""
    convert = FxFlow.convert

    def spoiled(flow: FxFlow, prepared: Prepared) -> QuantizedModel:
        converted = convert(flow, prepared)
        converted.module.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: torch.quantize_per_tensor(
                output.dequantize() / 2, output.q_scale(), output.q_zero_point(), torch.quint8
            )
        )
        return converted

    monkeypatch.setattr(FxFlow, "convert", spoiled)


def test_a_flow_that_changes_a_model_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "blocks.0.conv2")
    with pytest.raises(InputError, match=r"blocks\.0\.conv2 \(Conv2d\) has.*this model works with flow=eager or"):
        quantize.dry_run(trained(architectures.tiny()), FLOWS[FlowName.fx], spec(engine=Engine.qnnpack), images(1))


def test_a_run_whose_int8_model_is_another_function_fails(
    composed: Callable[..., Config], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "blocks.1.conv1")
    config = composed("model=tiny", "flow=fx", "engine=qnnpack", "latency=off", f"model.checkpoint={checkpoint}")
    with pytest.raises(RunError, match=r"blocks\.1\.conv1 \(ConvReLU2d\) has"):
        run.run_experiment(config, tmp_path)


class Normalised(nn.Module):
    """PoolFormer's mixer: what a function of torch's in FP32 returns is rounded before a pooling and a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(self.conv(x), 1)
        return self.pool(x) - x


def test_a_float_layer_that_reads_a_rounded_tensor_is_compared_on_its_grid() -> None:
    right = case(Normalised(), FlowName.fx, Engine.onednn)
    assert right.fault() == ""
    assert 0.1 < right.deviations()["sub"].read < 0.51
    int8 = copy.deepcopy(right.int8)
    (difference,) = [node for node in int8.graph.nodes if node.name == "sub"]
    difference.args = (difference.args[0], difference.args[0])
    int8.recompile()
    wrong = Case(right.fused, int8, right.flow, right.engine, right.prepared)
    assert "sub (sub) reads a tensor that is" in wrong.fault()
