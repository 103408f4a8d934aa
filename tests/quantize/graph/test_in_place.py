"""Operators that work in place: the graph computes what the module does, whoever reads the tensor afterwards.

The right value is always the module's own answer, which plain PyTorch computes in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.errors import InputError
from qexp.quantize import FLOWS
from qexp.quantize.graph.tracing import UntraceableError, trace
from tests.helpers.quantizable import images, relative_error, settings, spec, trained

TWO = images(2)


class Body(nn.Module):
    """A convolution and a BatchNorm, then whatever `act` does to their output, then another layer."""

    def __init__(self, act: Callable[[Body, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.hardswish = nn.ReLU(inplace=True), nn.Hardswish(inplace=True)
        self.relu6, self.elu = nn.ReLU6(inplace=True), nn.ELU(inplace=True)
        self.last, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self, self.bn(self.conv(x)))
        return self.fc(self.last(x).mean((2, 3)))


def statement(write: Callable[[Body, Tensor], object]) -> Callable[[Body, Tensor], Tensor]:
    """Does something to a tensor as a statement, and goes on with the tensor."""

    def act(net: Body, x: Tensor) -> Tensor:
        write(net, x)
        return x

    return act


def through_alias(net: Body, x: Tensor) -> Tensor:
    y = x
    x += 1.0
    return y


def residual(net: Body, x: Tensor) -> Tensor:
    kept = x
    y = net.relu(x)
    return y + kept


def read_before_and_after(net: Body, x: Tensor) -> Tensor:
    before = x * 2.0
    x.relu_()
    return before + x


def view_made_before(net: Body, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    net.relu(x)
    return flat.view(x.shape)


def view_of_view(net: Body, x: Tensor) -> Tensor:
    first = x[:, :4]
    second = first[:, 2:]
    x.relu_()
    return torch.cat([first, second, second], 1)


def written_view(net: Body, x: Tensor) -> Tensor:
    x.view(x.size(0), -1).relu_()
    return x


def written_permutation(net: Body, x: Tensor) -> Tensor:
    net.hardswish(x.permute(0, 2, 3, 1))
    return x


def halves(net: Body, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([F.relu_(a), b], 1)


def twice(net: Body, x: Tensor) -> Tensor:
    net.hardswish(x)
    x.mul_(0.5).add_(0.1)
    return x


def out_argument(net: Body, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, 1.0, out=y)
    return y


def metadata(net: Body, x: Tensor) -> Tensor:
    x.unsqueeze_(1)
    return x.squeeze(1)


def filled(net: Body, x: Tensor) -> Tensor:
    y = x.clone()
    y.zero_()
    y.copy_(x)
    return y


def channels_last_copy(net: Body, x: Tensor) -> Tensor:
    y = x.contiguous()
    y.relu_()
    return x


FORMS: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "ReLU module": statement(lambda net, x: net.relu(x)),
    "Hardswish module": statement(lambda net, x: net.hardswish(x)),
    "ReLU6 module": statement(lambda net, x: net.relu6(x)),
    "ELU module": statement(lambda net, x: net.elu(x)),
    "F.relu_": statement(lambda net, x: F.relu_(x)),
    "F.relu(inplace)": statement(lambda net, x: F.relu(x, inplace=True)),
    "F.relu(True)": statement(lambda net, x: F.relu(x, True)),
    "F.hardtanh_": statement(lambda net, x: F.hardtanh_(x, 0.0, 1.0)),
    "F.leaky_relu_": statement(lambda net, x: F.leaky_relu_(x, 0.1)),
    "F.silu(inplace)": statement(lambda net, x: F.silu(x, inplace=True)),
    "relu_": statement(lambda net, x: x.relu_()),
    "clamp_": statement(lambda net, x: x.clamp_(0, 1)),
    "add_": statement(lambda net, x: x.add_(x, alpha=0.5)),
    "sigmoid_": statement(lambda net, x: x.sigmoid_()),
    "torch.relu_": statement(lambda net, x: torch.relu_(x)),
    "operator.imul": statement(lambda net, x: operator.imul(x, 0.5)),
    "through an alias": through_alias,
    "residual": residual,
    "read before and after": read_before_and_after,
    "a view made before": view_made_before,
    "a view of a view": view_of_view,
    "a view written": written_view,
    "a permutation written": written_permutation,
    "one half written": halves,
    "several": twice,
    "out=": out_argument,
    "unsqueeze_": metadata,
    "zero_ and copy_": filled,
    "no copy": channels_last_copy,
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_graph_computes_what_the_module_does(form: str) -> None:
    net = trained(Body(FORMS[form]))
    batch = images(5, seed=2)
    expected = net(batch.clone())
    graph = trace(net, TWO)
    assert torch.allclose(graph(batch.clone()), expected, atol=1e-6)
    fused = FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    assert relative_error(fused(batch.clone()), expected) < 1e-5
    names = [str(node.target if node.op == "call_method" else node.name) for node in fused.graph.nodes]
    assert not [name for name in names if name.endswith("_") or name == "setitem"]


@pytest.mark.parametrize("form", list(FORMS))
def test_int8_in_fx_is_close_to_the_module(form: str) -> None:
    net = trained(Body(FORMS[form]))
    fused = FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    prepared = FLOWS[FlowName.fx].prepare(fused, spec(settings(overflow="activations")), TWO)
    quantize.calibrate(prepared, [images(16, seed=3)])
    converted = FLOWS[FlowName.fx].convert(prepared).module
    batch = images(8, seed=4)
    with quantize.engine(Engine.x86), torch.inference_mode():
        assert relative_error(converted(batch), net(batch.clone())) < 0.2


def test_in_place_where_nobody_else_reads_stays_as_it_was() -> None:
    net = trained(Body(lambda net, x: net.relu6(x)))
    fused = FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    assert fused.get_submodule("relu6").inplace


def test_the_image_itself_may_be_written_to() -> None:
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body(lambda net, x: x)

        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.5).div_(2.0)
            return self.body(x)

    net, kept = trained(Normalises()), TWO.clone()
    fused = FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    assert torch.equal(TWO, kept)
    assert relative_error(fused(TWO), net(TWO.clone())) < 1e-5
    assert torch.equal(TWO, kept)


def part_assigned(net: Body, x: Tensor) -> Tensor:
    x[:, :3] = 0.0
    return x


def part_written(net: Body, x: Tensor) -> Tensor:
    x[:, :3].relu_()
    return x


def half_written_and_the_whole_read(net: Body, x: Tensor) -> Tensor:
    a, _ = x.chunk(2, 1)
    F.relu_(a)
    return x


@pytest.mark.parametrize("act", [part_assigned, part_written, half_written_and_the_whole_read])
def test_a_part_that_is_written_is_refused_with_its_module_before_any_work(
    act: Callable[[Body, Tensor], Tensor],
) -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 3, 1), Body(act)))
    sentence = r"flow=fx can't trace Sequential: its module 1 \(Body\) writes in place into a part .*torch.cat"
    with pytest.raises(InputError, match=sentence):
        FLOWS[FlowName.fx].fuse(net, spec(), TWO)


def test_a_model_that_changes_its_own_buffer_is_refused() -> None:
    class Counts(Body):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x)
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.seen.mul_(0.9).add_(y.mean((0, 2, 3)))
            return self.fc(y.mean((2, 3)) - self.seen)

    with pytest.raises(UntraceableError, match="changes a weight, buffer or constant"):
        trace(trained(Counts()), TWO)


class Stated(nn.Module):
    """A block whose activation is a statement, as eager mode takes it: modules alone."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act
        self.last, self.pool, self.fc = nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        self.act(x)
        return self.fc(self.pool(self.last(x)).flatten(1))


WRITERS = [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.CELU]


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_eager_writes_in_place_whatever_the_int8_module_does(kind: type[nn.Module], fusion: bool) -> None:
    torch.manual_seed(0)
    net = trained(Stated(kind(inplace=True)))
    other = trained(Stated(nn.Identity()))
    quantize.dry_run(net, FLOWS[FlowName.eager], spec(fusion=fusion), TWO)
    fused = FLOWS[FlowName.eager].fuse(net, spec(fusion=fusion), TWO)
    prepared = FLOWS[FlowName.eager].prepare(fused, spec(settings(overflow="activations")), TWO)
    quantize.calibrate(prepared, [images(16, seed=3)])
    converted = FLOWS[FlowName.eager].convert(prepared).module
    batch = images(8, seed=4)
    with quantize.engine(Engine.x86), torch.inference_mode():
        expected, answer = net(batch.clone()), converted(batch.clone())
        traced = torch.jit.trace(converted, batch[:2], check_trace=False)
        assert torch.equal(traced(batch.clone()), answer)
    error = relative_error(answer, expected)
    assert error < 0.2
    # What the model computes without its activation is further away.
    assert error < 0.5 * relative_error(other(batch), expected)


def test_layers_whose_result_is_assigned_get_no_hook() -> None:
    net = trained(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(inplace=True), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    )
    fused = FLOWS[FlowName.eager].fuse(net, spec(), TWO)
    prepared = FLOWS[FlowName.eager].prepare(fused, spec(), TWO)
    assert prepared.module.module[1].inplace
    # torch's observers are hooks; there is no other.
    assert [hook.__name__ for hook in prepared.module.module[1]._forward_hooks.values()] == ["_observer_forward_hook"]
