"""Uses of tensors in a model's Python that can be traced; the module itself computes the right value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.errors import InputError
from qexp.quantize import FLOWS
from qexp.quantize.graph.tracing import UntraceableError, trace
from qexp.quantize.torch_backend import layers as torch_layers
from tests.helpers.quantizable import Plain, images, relative_error, settings, spec, trained

TWO = images(2)


def positions(x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)


def batch_positions(x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)


def by_dtype(x: Tensor) -> Tensor:
    return x * 2.0 if x.dtype == torch.float32 else x.float()


def by_device(x: Tensor) -> Tensor:
    return -x if x.is_cuda or x.device.type != "cpu" else x * 3.0


def by_kind(x: Tensor) -> Tensor:
    assert x.layout == torch.strided
    assert x.type() == "torch.FloatTensor"
    assert x.is_floating_point()
    assert torch.is_floating_point(x)
    assert not any((x.is_quantized, x.requires_grad, x.is_sparse))
    return x * 0.5 if x.is_contiguous() else x


def new_tensors(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(x.size(0), 1, *x.shape[2:])], 1)[:, :3] + x.new_ones(1)


def casts(x: Tensor) -> Tensor:
    return x.to(x.dtype).type_as(x).type(torch.float32).to(device=x.device, dtype=x.dtype).to(x).float()


def finest(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).min, max=torch.finfo(x.dtype).max) + torch.finfo(x.dtype).eps


def transposed(x: Tensor) -> Tensor:
    return x.flatten(2).mT.transpose(1, 2).view_as(x).data.detach()


def with_names(x: Tensor) -> Tensor:
    return x - x.flatten(1).max(1).values.view(-1, 1, 1, 1)


def parts(x: Tensor) -> Tensor:
    chunks = x.chunk(3, 1)
    return torch.cat([chunks[i] * (i + 1.0) for i in range(len(chunks))], 1)


def sizes(x: Tensor) -> Tensor:
    return x / (x.numel() / x.shape[0]) * float(x.shape[1:].numel()) / x.size()[1:].numel() * 100.0 + x.ndimension()


def counted(x: Tensor) -> Tensor:
    size = x.shape[1]
    size += 2
    return x * size


def kind_checked(x: Tensor) -> Tensor:
    return x + 1.0 if isinstance(x, Tensor) and torch.is_tensor(x) else x


def made_of_sizes(x: Tensor) -> Tensor:
    n, h = x.shape[0], x.shape[2]
    grid = torch.linspace(0.0, 1.0, h).view(1, 1, h, 1).expand(n, -1, -1, h)
    state = (
        torch.zeros(n, 3, 1, 1) + torch.ones(x.shape) + torch.full((n, 1, 1, 1), 0.5) + torch.zeros(size=(n, 1, 1, 1))
    )
    return x + grid + state + torch.arange(3.0).repeat(n, 1).view(n, 3, 1, 1)


def by_length(x: Tensor) -> Tensor:
    return (x.reshape(len(x), -1) * len([1.0, 2.0])).view(len(x), *x.shape[1:])


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()


class Half(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)


def own_functions(x: Tensor) -> Tensor:
    return Half.apply(Swish.apply(x))


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(own_functions, x, use_reentrant=True)


ASKED: list[Callable[[Tensor], Tensor]] = [
    positions, batch_positions, by_dtype, by_device, by_kind, new_tensors, casts, finest, transposed, with_names, parts,
    sizes, counted, kind_checked, made_of_sizes, by_length, own_functions, checkpointed,
]  # fmt: skip


@pytest.mark.parametrize("ask", ASKED)
def test_what_a_model_asks_of_a_tensor_is_known(ask: Callable[[Tensor], Tensor]) -> None:
    class Asks(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(ask(x))

    net = trained(Asks())
    graph = trace(net, TWO)
    for count in (1, 5):
        batch = images(count, seed=3)
        assert torch.allclose(graph(batch), net(batch), atol=1e-5)


@pytest.mark.parametrize("ask", ASKED)
def test_such_a_model_goes_through_fx_and_stays_close(ask: Callable[[Tensor], Tensor]) -> None:
    class Asks(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.bn1(self.conv1(ask(x)))).mean((2, 3)))

    net = trained(Asks())
    quantize.dry_run(net, FLOWS[FlowName.fx], spec(), TWO)
    prepared = FLOWS[FlowName.fx].prepare(
        FLOWS[FlowName.fx].fuse(net, spec(), TWO), spec(settings(overflow="activations")), TWO
    )
    quantize.calibrate(prepared, [images(16, seed=3)])
    converted = FLOWS[FlowName.fx].convert(prepared).module
    assert all(layer.int8 for layer in torch_layers.layers(converted, FLOWS[FlowName.fx], Engine.x86))
    with quantize.engine(Engine.x86), torch.inference_mode():
        assert relative_error(converted(images(8, seed=4)), net(images(8, seed=4))) < 0.2


class Options(Plain):
    def forward(self, x: Tensor, return_features: bool = False, *extra: Any, scale: float | None = None) -> Any:
        features = F.relu(self.bn1(self.conv1(x)))
        if scale is not None:
            features = features * scale
        logits = self.fc(features.mean((2, 3)))
        return (logits, features) if return_features or extra else logits


def test_other_arguments_have_their_defaults() -> None:
    net = trained(Options())
    graph = trace(net, TWO)
    assert torch.equal(graph(TWO), net(TWO))
    assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["x"]
    for flow in (FlowName.eager, FlowName.fx):
        quantize.dry_run(net, FLOWS[flow], spec(), TWO)


def test_a_forward_of_any_arguments_is_taken() -> None:
    class Anything(Plain):
        def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(args[0])

    net = trained(Anything())
    assert torch.equal(trace(net, TWO)(TWO), net(TWO))


def test_a_forward_of_the_instance_and_hooks_belong_to_the_model() -> None:
    net = trained(Plain())
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2.0,))
    net.register_forward_hook(lambda module, inputs, output: output + 1.0)
    assert torch.equal(trace(net, TWO)(TWO), net(TWO))
    other = trained(Plain())
    other.forward = lambda x: other.fc(other.conv1(x).mean((2, 3)))  # type: ignore[method-assign]
    assert torch.equal(trace(other, TWO)(TWO), other(TWO))


def test_what_is_the_same_for_all_images_can_be_iterated_over() -> None:
    class Weighted(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.relu(self.weights) / 6
            assert weights.shape[0] == 3
            return sum(weight * super(Weighted, self).forward(x + i) for i, weight in enumerate(weights))

    net = trained(Weighted())
    assert torch.equal(trace(net, TWO)(TWO), net(TWO))


def test_a_decision_by_values_is_refused_in_words() -> None:
    class Branching(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > 0 else -x)

    with pytest.raises(UntraceableError, match="decides by the values of a tensor"):
        trace(trained(Branching()), TWO)


def test_no_reason_holds_a_tensor() -> None:
    class Fails(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"bad weight\n{self.fc.weight}")

    with pytest.raises(UntraceableError) as refusal:
        trace(trained(Fails()), TWO)
    assert "tensor" not in str(refusal.value)
    assert "bad weight" in str(refusal.value)


def test_a_module_that_counts_its_calls_is_not_changed_by_tracing() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace(net, TWO)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor, lambda x: torch.zeros(3).data.set_(x)])
def test_what_only_takes_a_real_tensor_is_refused_and_crashes_nothing(make: Callable[[Tensor], Tensor]) -> None:
    class Makes(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + make(x.mean()))

    with pytest.raises(UntraceableError, match="can't be followed symbolically"):
        trace(trained(Makes()), TWO)


def test_python_is_as_it_was_after_tracing() -> None:
    before = (isinstance, len, torch.zeros, Tensor.expand, torch.autograd.Function.__dict__["apply"])
    trace(trained(Plain()), TWO)
    assert before == (isinstance, len, torch.zeros, Tensor.expand, torch.autograd.Function.__dict__["apply"])
    assert "expand" not in vars(Tensor)


class Squeezes(Plain):
    """squeeze() without a dimension takes that of the images, too, where there is one."""

    def __init__(self, squeeze: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.scale = nn.Parameter(torch.full((1, 1, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(F.adaptive_avg_pool2d(self.conv1(x), 1))
        return self.fc(x) * self.squeeze(self.scale.clone())


SPELLINGS = pytest.mark.parametrize(
    "squeeze", [lambda x: x.squeeze(), torch.squeeze, lambda x: x.squeeze_()], ids=["method", "function", "in place"]
)


@SPELLINGS
def test_squeeze_keeps_the_dimension_of_the_images(squeeze: Callable[[Tensor], Tensor]) -> None:
    net = trained(Squeezes(squeeze))
    graph = trace(net, TWO)
    assert torch.equal(graph(TWO), net(TWO))
    assert graph(TWO[:1]).shape == (1, 10)
    assert torch.allclose(graph(TWO[:1]), net(TWO)[:1], atol=1e-5)
    quantize.dry_run(net, FLOWS[FlowName.fx], spec(), TWO)


@SPELLINGS
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.dynamic])
def test_a_squeeze_that_int8_does_not_take_is_named(squeeze: Callable[[Tensor], Tensor], flow: FlowName) -> None:
    class Named(Squeezes):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.squeeze(F.adaptive_avg_pool2d(self.conv1(x), 1)))

    said = (
        r"squeeze_?\(\) in its own forward \(Named\) also drops the batch dimension of a single image; "
        r"write flatten\(1\); this model works with flow=fx\.$"
    )
    with pytest.raises(InputError, match=said):
        quantize.dry_run(trained(Named(squeeze)), FLOWS[flow], spec(engine=Engine.qnnpack), TWO)


def test_a_float_model_that_fails_for_one_image_by_its_squeeze_is_told_so() -> None:
    class Fails(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(self.fc(F.adaptive_avg_pool2d(self.conv1(x), 1).squeeze()), 1)

    with pytest.raises(InputError, match=r"can't take one image alone: squeeze\(\) in its own forward \(Fails\)"):
        quantize.dry_run(trained(Fails()), FLOWS[FlowName.eager], spec(engine=Engine.qnnpack), TWO)


@pytest.mark.parametrize("flow", FlowName)
def test_a_squeeze_of_the_logits_harms_nothing(flow: FlowName) -> None:
    class Last(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.adaptive_avg_pool2d(self.conv1(x), 1).flatten(1)).squeeze()

    quantize.dry_run(trained(Last()), FLOWS[flow], spec(engine=Engine.qnnpack), TWO)
