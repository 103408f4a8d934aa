"""The copy that each flow begins with: plain weights, plain layers, and each module once, whatever names it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.models import float_model
from qexp.quantize import FLOWS
from qexp.quantize.graph.copies import each_once, evaluation_copy
from qexp.quantize.inspection import fusion_check
from qexp.quantize.torch_backend import layers as torch_layers
from tests.helpers.quantizable import BY_TORCH, images, relative_error, settings, spec, trained

TWO = images(2)
SETTINGS = settings()
SAVED = images(8, seed=4)


def converted(net: nn.Module, flow: FlowName) -> nn.Module:
    """The difference with qnnpack, whose accumulators are exact on every CPU."""
    quantize.dry_run(net, FLOWS[flow], spec(SETTINGS, engine=Engine.qnnpack), TWO)
    fused = FLOWS[flow].fuse(net, spec(), TWO)
    assert fusion_check.fusion_difference(net, fused, SAVED) < 1e-5
    prepared = FLOWS[flow].prepare(fused, spec(SETTINGS, engine=Engine.qnnpack), TWO)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, images(16, seed=3).split(8))
    return FLOWS[flow].convert(prepared).module


def error(int8: nn.Module, net: nn.Module) -> float:
    with quantize.engine(Engine.qnnpack), torch.inference_mode():
        return relative_error(int8(SAVED), net(SAVED))


def int8_layers(int8: nn.Module, flow: FlowName) -> list[str]:
    layers = torch_layers.layers(int8, FLOWS[flow], Engine.qnnpack)
    assert flow is FlowName.dynamic or all(layer.int8 for layer in layers)
    return [layer.name for layer in layers if layer.int8]


# ------------------------------------------------------------------------------------------------ computed weights


class Magnitude(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class EverySecond(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


COMPUTED: dict[str, Callable[[Any], object]] = {
    "l1": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "random": lambda net: prune.random_unstructured(net[0], "weight", 0.5),
    "structured": lambda net: prune.ln_structured(net[0], "weight", 0.5, 2, 0),
    "random structured": lambda net: prune.random_structured(net[0], "weight", 0.3, 1),
    "twice": lambda net: [
        prune.l1_unstructured(net[0], "weight", 0.5),
        prune.ln_structured(net[0], "weight", 0.3, 2, 0),
    ],
    "bias": lambda net: [prune.l1_unstructured(net[0], name, 0.5) for name in ("weight", "bias")],
    "norm": lambda net: prune.l1_unstructured(net[1], "weight", 0.5),
    "a mask": lambda net: prune.custom_from_mask(net[5], "weight", torch.arange(10 * 8).view(10, 8) % 3 > 0),
    "a method": lambda net: EverySecond.apply(net[0], "weight"),
    "global": lambda net: prune.global_unstructured(
        [(net[0], "weight"), (net[5], "weight")], pruning_method=prune.L1Unstructured, amount=0.6
    ),
    "old weight norm": lambda net: weight_norm(net[0]),
    "old spectral norm": lambda net: spectral_norm(net[0]),
    "pruned within a weight norm": lambda net: [
        weight_norm(net[0]),
        prune.l1_unstructured(net[0], "weight_v", 0.5),
    ],
    "weight norm of a pruned weight": lambda net: [
        prune.l1_unstructured(net[0], "weight", 0.5),
        weight_norm(net[0], "weight_orig"),
    ],
    "weight norm": lambda net: parametrizations.weight_norm(net[0]),
    "spectral norm": lambda net: parametrizations.spectral_norm(net[0]),
    "orthogonal": lambda net: parametrizations.orthogonal(net[5]),
    "a parametrization": lambda net: parametrize.register_parametrization(net[0], "weight", Magnitude()),
    "of a buffer": lambda net: parametrize.register_parametrization(net[1], "running_mean", Magnitude()),
}


def chain() -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layers)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed_at_each_call_are_plain_in_the_copy(name: str) -> None:
    net = trained(chain())
    plain = set(net.state_dict())
    net.requires_grad_(True)
    COMPUTED[name](net)
    made = evaluation_copy(net.eval(), TWO)
    assert {key: kind(made, key) for key in plain} == {key: kind(chain(), key) for key in plain}
    assert set(made.state_dict()) == plain
    assert [type(part) for part in made] == [type(part) for part in chain()]
    assert not any(part._forward_pre_hooks for part in made.modules())
    with torch.no_grad():
        torch.testing.assert_close(made(SAVED), net(SAVED))


def kind(module: nn.Module, key: str) -> str:
    return "parameter" if key in dict(module.named_parameters()) else "buffer"


@pytest.mark.parametrize("flow", BY_TORCH)
def test_a_pruned_model_goes_through_every_flow_and_keeps_its_zeros(flow: FlowName) -> None:
    net = trained(chain())
    net.requires_grad_(True)
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.ln_structured(net[5], "weight", 0.5, 2, 1)
    int8 = converted(net, flow)
    assert error(int8, net) < 0.1
    linear = next(part for part in int8.modules() if "Linear" in type(part).__name__)
    assert (linear.weight().dequantize() == 0).all(dim=0).sum() >= 4


# ------------------------------------------------------------------------------------------------ plain layers


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_a_synchronised_batchnorm_is_folded_like_any_other(flow: FlowName) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)),
        )

    plain = trained(net())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(trained(net()))
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in synced.modules()) == 2
    int8, expected = converted(synced, flow), converted(plain, flow)
    assert int8_layers(int8, flow) == ["0", "5", "8"]
    with quantize.engine(Engine.qnnpack), torch.inference_mode():
        assert torch.equal(int8(SAVED), expected(SAVED))


class Compiled(nn.Module):
    """As torch.compile wraps a module, without the seconds that its import takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


def wrapped(num_classes: int) -> nn.Module:
    """As the ImageNet example of old wraps the features alone, and a user a part that is slow."""
    net = trained(chain())
    return nn.Sequential(nn.DataParallel(net[:3]), Compiled(net[3:5]), net[5])


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_wrappers_around_parts_of_a_model_are_taken_off(flow: FlowName) -> None:
    int8 = converted(wrapped(10), flow)
    assert int8_layers(int8, flow) == ["0.0", "2"]
    with torch.inference_mode():
        expected = trained(chain())(SAVED)
    with quantize.engine(Engine.qnnpack), torch.inference_mode():
        assert relative_error(int8(SAVED), expected) < 0.1
    built = float_model.build({"_target_": f"{__name__}.wrapped", "num_classes": 10}, 10, 0)
    assert [name for name, _ in built.named_parameters()][:2] == ["0.0.weight", "0.0.bias"]


def test_a_model_s_own_way_to_save_and_load_does_not_reach_the_int8_model() -> None:
    net = trained(chain())
    net.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.pop(f"{prefix}0.weight"))
    net.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state.update(surplus=torch.ones(1)))
    fused = FLOWS[FlowName.eager].fuse(net, spec(), TWO)
    int8 = converted(net, FlowName.eager)
    skeleton = quantize.skeleton(fused, FLOWS[FlowName.eager], spec(SETTINGS, engine=Engine.qnnpack), TWO)
    with quantize.engine(Engine.qnnpack), torch.inference_mode():
        skeleton.load_state_dict(int8.state_dict(), assign=True)
        assert torch.equal(skeleton(SAVED), int8(SAVED))


# ------------------------------------------------------------------------------------------------ several names


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


class TwoNames(nn.Module):
    """One block under two names, called under the second first; one Linear too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 8)
        self.a = block()
        self.b = self.a
        self.head = self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.b(self.stem(x))).mean((2, 3))
        return self.head(self.fc(x))


class SharedLeaves(nn.Module):
    """The same three layers in three Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv, self.norm, self.relu = block()
        self.two = nn.Sequential(self.conv, self.norm, self.relu)
        self.three = nn.ModuleList([self.two, nn.Sequential(self.conv, self.norm, self.relu)])
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.relu(self.norm(self.conv(self.stem(x)))))
        for part in self.three:
            x = part(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "flow", "names"),
    [
        (TwoNames, FlowName.eager, ["stem", "fc", "a.0"]),
        (TwoNames, FlowName.dynamic, ["fc"]),
        (SharedLeaves, FlowName.eager, ["stem", "conv", "fc"]),
        (SharedLeaves, FlowName.dynamic, ["fc"]),
    ],
)
def test_a_module_of_several_names_is_one_layer_in_int8(
    kind: type[nn.Module], flow: FlowName, names: list[str]
) -> None:
    net = trained(kind())
    int8 = converted(net, flow)
    assert int8_layers(int8, flow) == names
    assert error(int8, net) < 0.1
    parts = [part for _, part in int8.named_modules(remove_duplicate=False)]
    assert not any(type(part) is nn.Linear for part in parts)
    assert len({part for part in parts if type(part).__name__ == "LinearPackedParams"}) == 1


@pytest.mark.parametrize("kind", [TwoNames, SharedLeaves])
def test_a_module_of_several_names_is_observed_once_at_each_call(kind: type[nn.Module]) -> None:
    net = trained(kind())
    prepared = FLOWS[FlowName.eager].prepare(
        FLOWS[FlowName.eager].fuse(net, spec(), TWO), spec(SETTINGS, engine=Engine.qnnpack), TWO
    )
    quantize.calibrate(prepared, [SAVED])
    seen: list[Tensor] = []
    shared = net.a[2] if isinstance(net, TwoNames) else net.relu
    with shared.register_forward_hook(lambda module, inputs, output: seen.append(output.clone())):
        net(SAVED)
    name = "a.0" if isinstance(net, TwoNames) else "conv"
    qparams = torch_layers.read_qparams(prepared.module)
    assert name in qparams
    assert not any(other.startswith(("b.", "two", "three", "head")) for other in qparams)
    expected = max(float(output.max()) for output in seen) / 255
    assert float(qparams[name].scale[0]) == pytest.approx(expected, rel=1e-4)
    converted = FLOWS[FlowName.eager].convert(prepared).module
    assert set(torch_layers.read_qparams(converted)) == set(qparams)


def test_within_each_once_a_module_has_one_name_and_what_takes_its_place_has_all() -> None:
    net = SharedLeaves()

    def names(wanted: nn.Module) -> Iterator[str]:
        return (name for name, part in net.named_modules(remove_duplicate=False) if part is wanted)

    before, new = list(names(net.conv)), nn.Conv2d(8, 8, 1)
    with each_once(net):
        assert list(names(net.conv)) == ["conv"]
        net.conv = new
    assert list(names(new)) == before == ["conv", "two.0", "three.0.0", "three.1.0"]
    assert net.three[0] is net.two
