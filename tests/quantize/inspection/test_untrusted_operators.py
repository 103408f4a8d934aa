"""Functions on INT8 tensors: those that eager mode can't observe are refused before any work, the others are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.errors import InputError
from qexp.quantize import FLOWS
from qexp.quantize.inspection.untrusted_operators import run_or_refuse
from tests.helpers.quantizable import images, relative_error, settings, spec, trained

TWO = images(2)
SETTINGS = settings()
EXACT = settings(overflow="weights")  # 16-bit sums of a CPU without VNNI, too
One = Callable[[Tensor], Tensor]
Two = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Two tensors of other ranges, and what a function makes of them."""

    def __init__(self, function: Two) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.narrow(x), self.wide(x))


class Net(nn.Module):
    def __init__(self, function: Two) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.block = Block(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


def net_of(function: Two) -> nn.Module:
    net = trained(Net(function))
    net.block.wide.weight.data.mul_(5)
    return net


def dry_run(net: nn.Module, flow: FlowName = FlowName.eager, engine: Engine = Engine.x86) -> None:
    quantize.dry_run(net, FLOWS[flow], spec(SETTINGS, engine=engine), TWO)


def error(net: nn.Module, flow: FlowName = FlowName.eager, engine: Engine = Engine.qnnpack) -> float:
    """The error of the INT8 model's outputs."""
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), TWO), spec(EXACT, engine=engine), TWO)
    quantize.calibrate(prepared, [images(8, seed=3)])
    converted = FLOWS[flow].convert(prepared).module
    with quantize.engine(engine), torch.inference_mode():
        return relative_error(converted(images(8, seed=4)), net(images(8, seed=4)))


def in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def copied(x: Tensor, y: Tensor) -> Tensor:
    return x.copy_(y)


UNOBSERVED: dict[str, tuple[Two, str, str]] = {
    "cat": (lambda x, y: torch.cat([x, y], 1), "aten::cat", "FloatFunctional().cat"),
    "concat of pieces": (lambda x, y: torch.concat([x, y[:, :2]], 1), "aten::cat", "FloatFunctional().cat"),
    "hstack": (lambda x, y: torch.hstack([x, y]), "aten::cat", "FloatFunctional().cat"),
    "stack": (lambda x, y: torch.stack([x, y], 1).flatten(1, 2), "aten::stack", "FloatFunctional().cat of unsqueezed"),
    "mean of several": (lambda x, y: torch.stack([x, y]).mean(0), "aten::stack", "FloatFunctional().cat of unsqueezed"),
    "+": (lambda x, y: x + y, "aten::add", "FloatFunctional().add "),
    "torch.add": (lambda x, y: torch.add(x, y, alpha=2), "aten::add", "FloatFunctional().add "),
    "+=": (in_place, "aten::add_", "FloatFunctional().add "),
    "-": (lambda x, y: x - y, "aten::sub", ""),
    "*": (lambda x, y: x * y, "aten::mul", "FloatFunctional().mul "),
    "by a number": (lambda x, y: x * 2, "aten::mul", "FloatFunctional().mul_scalar "),
    "and a number": (lambda x, y: x + 2, "aten::add", "FloatFunctional().add_scalar "),
    "by a weight": (lambda x, y: x * torch.ones(8, 1, 1), "aten::mul", ""),
    "@": (lambda x, y: x @ y, "aten::bmm", "FloatFunctional().matmul "),
    "maximum": (lambda x, y: torch.maximum(x, y), "aten::maximum", ""),
    "sum": (lambda x, y: x.sum((2, 3)), "aten::sum", ""),
    "std": (lambda x, y: x.std((2, 3)), "aten::std", ""),
    "resized by cubic pieces": (lambda x, y: F.interpolate(x, scale_factor=2, mode="bicubic"), "aten::upsample", ""),
    "padded by a number": (lambda x, y: F.pad(x, (1, 1), value=-9.0), "aten::constant_pad_nd", ""),
    "filled with a number": (lambda x, y: x.masked_fill(torch.ones(7, 7) > 0, 9.0), "aten::masked_fill", ""),
    "threshold": (lambda x, y: F.threshold(x, 0.1, 20.0), "aten::threshold", ""),
    "copied": (copied, "aten::copy_", ""),
    "silu": (lambda x, y: F.silu(x), "aten::silu", ""),
}


@pytest.mark.filterwarnings("error")  # torch's own says nothing that helps
@pytest.mark.parametrize("name", UNOBSERVED)
def test_what_eager_mode_can_not_observe_is_refused_with_the_module_and_what_to_write(name: str) -> None:
    function, operator, instead = UNOBSERVED[name]
    with pytest.raises(InputError) as refused:
        dry_run(net_of(function))
    sentence = str(refused.value)
    assert "module block (Block)" in sentence
    assert operator in sentence
    assert ("in its place" in sentence) == bool(instead)
    assert instead in sentence
    assert "flow=dynamic" not in sentence  # there is no linear layer
    assert "\n" not in sentence


def moved(x: Tensor) -> Tensor:
    """ShuffleNet's."""
    n, channels, height, width = x.shape
    return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)


OBSERVED: dict[str, One] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "threshold at zero": lambda x: F.threshold(x, 0.2, 0.0),
    "max-pooling": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "dilated max-pooling": lambda x: F.max_pool2d(x, 2, 1, 0, 2),
    "average pooling": lambda x: F.avg_pool2d(x, 2),
    "padded average pooling": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, 4),
    "mean over space": lambda x: x.mean((2, 3)),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "maximum over space": lambda x: x.flatten(2).max(2)[0],
    "topk": lambda x: x.flatten(1).topk(5)[0],
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True),
    "padded by zeros": lambda x: F.pad(x, (1, 1, 2, 0)),
    "cropped": lambda x: F.pad(x, (-1, -1, 0, 0)),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "filled with zeros": lambda x: x.masked_fill(torch.arange(7) > 4, 0.0),
    "shuffled": moved,
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "slices": lambda x: x[:, [0, 3], ::2, 1:],
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "repeated": lambda x: x.repeat_interleave(2, 1).repeat(1, 1, 2, 1),
    "rolled out": lambda x: x.unfold(2, 2, 2).flatten(1),
    "flipped": lambda x: x.flip(1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "a joint of one range": lambda x: torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1),
    "a joint of fixed ranges": lambda x: torch.cat([x.sigmoid(), x[:, :2].sigmoid()], 1),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_functions_whose_output_lies_in_the_range_of_their_input_are_taken_and_right(name: str) -> None:
    net = net_of(lambda x, y: OBSERVED[name](y))
    dry_run(net)
    assert error(net) < 0.08


def test_a_leaky_relu_is_not_taken_for_a_relu_that_fx_took_into_what_is_before() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.leaky_relu(self.first(x), 0.1))

    dry_run(trained(Leaky()), FlowName.fx)
    assert error(trained(Leaky()), FlowName.fx) < 0.05


def test_the_way_that_is_advised_for_cat_gives_what_fx_gives() -> None:
    class Dense(nn.Module):
        def __init__(self, joint: FloatFunctional | None) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 3, padding=1)
            self.joint = joint

        def joined(self, tensors: list[Tensor]) -> Tensor:
            return self.joint.cat(tensors, 1) if self.joint is not None else torch.cat(tensors, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.joined([x, self.first(x)])
            return torch.cat([x, self.second(x)], 1) if self.joint is None else self.last.cat([x, self.second(x)], 1)

    advised = Dense(FloatFunctional())
    advised.last = FloatFunctional()
    advised, bare = trained(advised), trained(Dense(None))
    with pytest.raises(InputError, match=r"own forward \(Dense\) computes aten::cat .* with flow=fx"):
        dry_run(bare)
    dry_run(advised)
    assert error(advised) < 0.05
    assert error(bare, FlowName.fx) < 0.05
    # This is what it is refused for.
    assert error(bare) > 2 * error(advised)


def test_adding_and_multiplying_by_numbers_works_as_advised() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
            self.scale, self.shift, self.both = FloatFunctional(), FloatFunctional(), FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.shift.add_scalar(self.scale.mul_scalar(self.conv(x), 0.25), 3.0)
            x = self.both.add(self.both.mul_scalar(x, 2.0), x)
            return self.fc(x.mean((2, 3)))

    net = trained(Scaled())
    dry_run(net)
    for engine in (Engine.qnnpack, Engine.x86):
        assert error(net, engine=engine) < 0.02


def test_branches_that_are_zero_until_they_are_trained_do_not_have_one_range() -> None:
    net = net_of(lambda x, y: torch.cat([x, y], 1))
    for conv in (net.block.narrow, net.block.wide):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    with pytest.raises(InputError, match="aten::cat"):
        dry_run(net)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("engine", list(quantize.supported()))
def test_a_kernel_that_answers_otherwise_than_in_fp32_is_found(flow: FlowName, engine: Engine) -> None:
    def averages(net: nn.Module) -> None:
        if engine is Engine.qnnpack:
            with pytest.raises(InputError, match=r"aten::avg_pool2d .* engine=qnnpack .* steps"):
                dry_run(net, flow, engine)
        else:
            dry_run(net, flow, engine)
            assert error(net, flow, engine) < 0.08

    averages(net_of(lambda x, y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)))
    averages(net_of(lambda x, y: F.avg_pool2d(y, 3, divisor_override=16)))


def test_a_sum_that_leaves_the_range_of_its_terms_is_found() -> None:
    net = net_of(lambda x, y: F.avg_pool2d(y, 3, divisor_override=1))
    with pytest.raises(InputError, match=r"aten::avg_pool2d .* steps"):
        dry_run(net)
    dry_run(net, FlowName.fx)
    assert error(net, FlowName.fx, Engine.x86) < 0.08  # fx has one range for both


def test_torch_s_own_warning_of_a_joint_is_not_shown() -> None:
    torch.set_warn_always(True)  # it warns once in a process, of which this test is not the first
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(InputError, match="aten::cat"):
                dry_run(net_of(lambda x, y: torch.cat([x, y], 1)))
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in said if "cat operator" in str(warning.message)]


def test_the_innermost_module_is_named_and_hooks_are_taken_off() -> None:
    net = net_of(lambda x, y: torch.cat([x, y], 1))
    prepared = FLOWS[FlowName.eager].prepare(net, spec(SETTINGS), TWO)
    quantize.calibrate(prepared, [TWO])
    converted = FLOWS[FlowName.eager].convert(prepared).module
    with quantize.engine(Engine.x86), pytest.raises(InputError, match=r"module block \(Block\)"):
        run_or_refuse(converted, FLOWS[FlowName.eager], TWO)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in converted.modules())


class Applied(nn.Module):
    def __init__(self, function: One) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize(
    "clamp", [nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-0.3, 0.7), F.relu6, lambda x: x.clamp(-0.5, 0.5)]
)
def test_a_clamp_behind_a_convolution_is_right_on_every_engine(clamp: One, engine: Engine, flow: FlowName) -> None:
    """Convolutions return channels-last, which qnnpack's clamps take for contiguous."""
    net = trained(nn.Sequential(nn.Conv2d(3, 8, 3), Applied(clamp), nn.Conv2d(8, 4, 1), nn.Flatten()))
    if flow is FlowName.eager and engine is Engine.qnnpack and not isinstance(clamp, nn.Module):
        with pytest.raises(InputError, match=r"aten::\w+ .* engine=qnnpack .* this model works with engine=x86"):
            dry_run(net, flow, engine)
    else:
        dry_run(net, flow, engine)
        # One part in 256 of a few layers' ranges, and 16-bit accumulators that saturate on some machines.
        assert error(net, flow, engine) < 0.1


def test_what_fails_in_a_graph_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    net = trained(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), Applied(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)), nn.Conv2d(8, 4, 1)
        )
    )
    with pytest.raises(InputError, match=r"aten::avg_pool2d.* works with engine=x86"):
        dry_run(net, FlowName.fx, Engine.qnnpack)
    assert "Traceback" not in capfd.readouterr().err
