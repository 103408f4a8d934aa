"""Faults of a float model that forbid a comparison with INT8 are refused before any work, naming the module."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp import quantize
from qexp.config.schema import FlowName
from qexp.errors import InputError
from qexp.models import float_model
from qexp.quantize import FLOWS
from qexp.quantize.inspection import fusion_check
from tests.helpers.quantizable import BY_TORCH, images, spec, trained

ONE = images(1)


class Net(nn.Module):
    """Two convolutions with BatchNorm and ReLU, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()
        self.head = Head()

    def features(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def with_head(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """Net whose head does that with the mean of each channel."""

    class Other(Head):
        pass

    Other.forward = lambda self, x: forward(self, x.mean((2, 3)))  # type: ignore[method-assign]
    net = Net()
    net.head = Other()
    return trained(net)


def refusal(net: nn.Module, flow: FlowName, fusion: bool = True, image: Tensor = ONE) -> str:
    """The error message of a dry run; "" if the model is supported."""
    try:
        quantize.dry_run(net, FLOWS[flow], spec(fusion=fusion), image, "the image cat.png")
    except InputError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert not re.search(r"used twice|tensor\(", sentence)
        return sentence
    return ""


@pytest.mark.parametrize("flow", BY_TORCH)
def test_what_computes_the_same_each_time_is_taken(flow: FlowName) -> None:
    assert refusal(trained(Net()), flow) == ""
    in_training = with_head(lambda self, x: self.fc(F.dropout(x, 0.5, training=self.training)))
    assert refusal(in_training, flow) == ""


@pytest.mark.parametrize("flow", BY_TORCH)
@pytest.mark.parametrize(
    ("forward", "function"),
    [
        (lambda self, x: self.fc(F.dropout(x, 0.5)), "torch.nn.functional.dropout"),
        (lambda self, x: F.alpha_dropout(self.fc(x), 0.01, training=True), "torch.nn.functional.alpha_dropout"),
        (lambda self, x: self.fc(x + torch.randn_like(x)), "torch.randn_like"),
        (lambda self, x: self.fc(x) * torch.rand(1), "torch.rand"),
        (lambda self, x: self.fc(x).mul(torch.empty(1).uniform_()), "torch.Tensor.uniform_"),
    ],
)
def test_a_model_that_draws_random_numbers_is_refused_with_the_function(
    flow: FlowName, forward: Callable[..., Tensor], function: str
) -> None:
    said = refusal(with_head(forward), flow)
    assert said.startswith("the float model has other logits for an image each time: ")
    assert f"{function} draws random numbers in its module head (Other)" in said
    assert ("pass it training=self.training" in said) == ("dropout" in function)


def test_numbers_that_are_drawn_and_not_used_are_no_fault() -> None:
    assert refusal(with_head(lambda self, x: self.fc(x) + 0 * torch.rand(1)), FlowName.dynamic) == ""


@pytest.mark.parametrize("flow", BY_TORCH)
def test_a_model_that_remembers_is_refused_with_the_module(flow: FlowName) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.fc(x * self.calls)

    assert "its module head (Other) keeps something from call to call" in refusal(with_head(forward), flow)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("whole", [True, False])
def test_autocast_is_named_and_what_works_too(flow: FlowName, whole: bool) -> None:
    class Cast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.features(x)
                return self.head(x) if whole else self.head(x.float())

    said = refusal(trained(Cast()), flow)
    assert "module conv1 (Conv2d) computes in bfloat16 under torch.autocast" in said
    assert "leave autocast to the code that trains the model" in said


def test_autocast_that_is_off_in_evaluation_is_no_fault() -> None:
    class Cast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.training):
                return self.head(self.features(x))

    assert refusal(trained(Cast()), FlowName.fx) == ""


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize(
    ("layer", "register"),
    [
        ("conv1", lambda m: m.register_forward_hook(lambda m, inputs, output: output * 2)),
        ("relu2", lambda m: m.register_forward_hook(lambda m, inputs, output: output + 1)),
        ("conv2", lambda m: m.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))),
    ],
)
def test_a_hook_that_changes_what_a_layer_gives_is_refused_with_the_layer(
    flow: FlowName, layer: str, register: Callable[[nn.Module], object]
) -> None:
    net = trained(Net())
    register(net.get_submodule(layer))
    assert f"module {layer} ({type(net.get_submodule(layer)).__name__}) has a hook that changes" in refusal(net, flow)


def test_hooks_of_the_model_itself_are_refused_and_those_of_modules_within_are_traced() -> None:
    net = trained(Net())
    net.head.register_forward_hook(lambda m, inputs, output: output * 2 + 1)
    assert refusal(net, FlowName.fx) == ""
    fused = FLOWS[FlowName.fx].fuse(net, spec(), ONE)
    torch.testing.assert_close(fused(ONE), net(ONE))
    net.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))
    assert refusal(net, FlowName.fx).startswith("the model itself (Net) has a hook that changes the model's output")


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_hooks_that_only_look_or_that_weight_norm_needs_are_no_fault(flow: FlowName) -> None:
    net = Net()
    seen: list[torch.Size] = []
    net.conv2.register_forward_hook(lambda m, inputs, output: seen.append(output.shape))
    net = trained(net)
    torch.nn.utils.weight_norm(net.conv1)  # a hook, too
    assert refusal(net, flow) == ""
    assert seen


@pytest.mark.parametrize("flow", BY_TORCH)
def test_a_batchnorm_without_running_statistics_is_named(flow: FlowName) -> None:
    net = trained(Net())
    net.bn2 = nn.BatchNorm2d(16, track_running_stats=False).eval()
    assert refusal(net, flow).startswith("module bn2 (BatchNorm2d) has track_running_stats=False")
    mirrored = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), trained(Net()))  # it gives the same then
    assert refusal(mirrored.eval(), flow).startswith("module 0 (BatchNorm2d) has track_running_stats=False")
    alone = nn.Sequential(trained(Net()), nn.BatchNorm1d(10, track_running_stats=False))  # it raises an error then
    assert refusal(alone.eval(), flow).startswith("module 1 (BatchNorm1d) has track_running_stats=False")


def test_a_model_that_fails_with_one_image_is_refused_with_what_it_says() -> None:
    net = with_head(lambda self, x: self.fc(x - x[1]))
    assert refusal(net, FlowName.fx).startswith("the float model can't take one image alone: index 1 is out of bounds")


@pytest.mark.parametrize("flow", BY_TORCH)
def test_what_is_not_finite_is_named_with_image_and_module(flow: FlowName) -> None:
    net = with_head(lambda self, x: self.fc(x) / (x - x).sum(1, keepdim=True))
    said = refusal(net, flow)
    assert said.startswith(
        "the float model gives NaN or infinity for the image cat.png, from its module head (Other) on"
    )
    net = trained(Net())
    net.conv2.weight.data[1, 2, 0, 0] = torch.nan
    assert refusal(net, flow) == "conv2.weight of the float model holds NaN or infinity; check model.checkpoint."
    assert "the image cat.png holds NaN or infinity after normalisation" in refusal(net, flow, image=ONE / 0)


def test_a_module_that_fusing_lost_is_named_before_any_work_with_what_works() -> None:
    class Twice(Net):
        def features(self, x: Tensor) -> Tensor:
            return self.relu1(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))

        def fuse_model(self, is_qat: bool = False) -> None:
            names = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]
            torch.ao.quantization.fuse_modules(self, names, inplace=True)

    net = trained(Twice())
    with pytest.raises(InputError, match=r"module relu1 is called 2 times, .* works with fusion=false or with flow=fx"):
        quantize.dry_run(net, FLOWS[FlowName.eager], spec(), ONE)
    assert refusal(net, FlowName.fx) == refusal(net, FlowName.eager, fusion=False) == ""


class Deep(nn.Module):
    """Twelve convolutions, as torch initialises them; a ReLU that its fuse_model takes away is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(12))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(12))
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = self.relu(x) if index < 2 else x.relu()
        return self.fc(x.mean((2, 3)))

    def fuse_model(self, is_qat: bool = False) -> None:
        torch.ao.quantization.fuse_modules(self, ["convs.0", "norms.0", "relu"], inplace=True)


def test_with_the_statistics_of_a_few_images_a_fault_shows_in_the_logits_of_an_untrained_model() -> None:
    net = Deep().eval()
    few = images(4, seed=5)
    assert fusion_check.fusion_difference(net, FLOWS[FlowName.eager].fuse(net, spec(), ONE), ONE) < 1e-3  # it fades
    float_model.with_statistics(net, few)
    assert not any(m.training for m in net.modules())
    x = net.convs[0](few)
    expected = 0.97 * x.mean((0, 2, 3)), 0.03 + 0.97 * x.var((0, 2, 3))
    torch.testing.assert_close((net.norms[0].running_mean, net.norms[0].running_var), expected)
    assert fusion_check.fusion_difference(net, FLOWS[FlowName.eager].fuse(net, spec(), ONE), ONE) > 0.03


def test_fx_does_not_advise_itself() -> None:
    net, other = trained(Net()), trained(Net(), seed=1)
    said = quantize.explained(net, FLOWS[FlowName.fx].fuse(other, spec(), ONE), FLOWS[FlowName.fx], images(4))
    assert "tracing follows one call of forward" in said
    assert "flow=" not in said


@pytest.mark.parametrize("flow", BY_TORCH)
def test_a_model_that_does_not_take_each_image_of_a_batch_by_itself_is_refused(flow: FlowName) -> None:
    flat = with_head(lambda self, x: self.fc(x.reshape(1, 16)))
    assert refusal(flat, flow).startswith(
        "the float model takes one image at a time, and fails with three: shape '[1, 16]' is invalid"
    )
    together = with_head(lambda self, x: self.fc(x / x.norm()))
    assert refusal(together, flow).startswith(
        "the float model's output for an image depends on the others in its batch, from its module head (Other) on"
    )
    one_answer = with_head(lambda self, x: self.fc(x.mean(0, keepdim=True)))
    assert refusal(one_answer, flow).startswith("the float model returns 1 rows of logits for three images")
    by_size = with_head(lambda self, x: self.fc(x.reshape(x.shape[0], -1) / x.norm(dim=1, keepdim=True)))
    assert refusal(by_size, FlowName.fx) == ""
