"""Layers and the reasons why they stay in FP32: every reason is true."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.errors import InputError
from qexp.quantize import FLOWS
from qexp.quantize.graph.tensor_names import public
from qexp.quantize.inspection.executed_operators import DispatchMode
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.records import Layer
from tests.helpers.quantizable import BY_TORCH, images, relative_error, settings, spec, trained

TWO = images(2)
SETTINGS = settings()


class Tokens(nn.Module):
    """A convolution that makes tokens [n, 49, 16], what is done with them, and a classifier."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.patches, self.body, self.head = nn.Conv2d(3, 16, 3, stride=2), body, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(tokens).flatten(1)


class Attention(nn.Module):
    def __init__(self, batch_first: bool = True, kdim: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return x if self.batch_first else x.transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.gru = kind(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


def taken(net: nn.Module, flow: FlowName) -> tuple[dict[str, Layer], float]:
    """As `converted`, of a model that a dry run takes."""
    quantize.dry_run(net, FLOWS[flow], spec(SETTINGS, engine=Engine.qnnpack), TWO)
    return converted(net, flow)


def converted(net: nn.Module, flow: FlowName) -> tuple[dict[str, Layer], float]:
    """The layers of the INT8 model by name, and the error of its outputs; accumulators are exact on every CPU."""
    engine = Engine.qnnpack
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), TWO), spec(SETTINGS, engine=engine), TWO)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, [images(8, seed=3)])
    model = FLOWS[flow].convert(prepared).module
    with quantize.engine(engine), torch.inference_mode():
        error = relative_error(model(images(8, seed=4)), net(images(8, seed=4)))
    return {layer.name: layer for layer in torch_layers.layers(model, FLOWS[flow], engine)}, error


def int8(layers: dict[str, Layer]) -> set[str]:
    return {name for name, layer in layers.items() if layer.int8}


def test_a_layer_within_what_fx_leaves_whole_says_so_and_the_projection_of_attention_counts() -> None:
    layers, error = taken(trained(Tokens(encoder())), FlowName.fx)
    assert int8(layers) == {"patches", "head"}
    inside = {f"body.{name}" for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")}
    assert set(layers) - int8(layers) == inside
    whole = "part of a TransformerEncoderLayer, which flow=fx leaves in FP32 as a whole"
    assert {layers[name].reason for name in inside} == {whole}
    assert {layers[name].kind for name in inside} == {"linear"}
    assert error < 0.15


@pytest.mark.parametrize(("kdim", "projections"), [(None, ["in_proj"]), (8, ["q_proj", "k_proj", "v_proj"])])
def test_attention_has_one_projection_of_its_input_or_three(kdim: int | None, projections: list[str]) -> None:
    class Mixed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, *[x if kdim is None else x[..., :kdim]] * 2, need_weights=False)[0]

    layers, _ = taken(trained(Tokens(Mixed(kdim=kdim))), FlowName.fx)
    names = [f"body.attention.{name}" for name in [*projections, "out_proj"]]
    assert [name for name in layers if name.startswith("body")] == names
    assert {layers[name].reason for name in names} == {
        "part of a MultiheadAttention, which flow=fx leaves in FP32 as a whole"
    }


def test_linear_layers_of_a_transformer_layer_are_int8_where_modules_are_exchanged() -> None:
    # torch's kernel for the whole layer would read weights that an INT8 module has no more.
    layers, error = taken(trained(Tokens(encoder())), FlowName.dynamic)
    assert int8(layers) == {"body.linear1", "body.linear2", "head"}
    of_attention = "part of a MultiheadAttention, which flow=dynamic leaves in FP32 as a whole"
    assert layers["body.self_attn.in_proj"].reason == layers["body.self_attn.out_proj"].reason == of_attention
    assert 0 < error < 0.05


def test_eager_attention_is_int8_where_torch_computes_it_rightly_and_refused_where_not() -> None:
    layers, error = taken(trained(Tokens(Attention(batch_first=False))), FlowName.eager)
    assert int8(layers) == set(layers)
    assert {"body.attention.linear_Q", "body.attention.linear_K", "body.attention.linear_V"} < set(layers)
    assert error < 0.2
    with pytest.raises(
        InputError, match=r"module body\.attention \(MultiheadAttention\) with batch_first=True.*flow=fx"
    ):
        taken(trained(Tokens(Attention())), FlowName.eager)


@pytest.mark.parametrize("flow", [FlowName.fx, FlowName.dynamic])
def test_recurrent_layers_count(flow: FlowName) -> None:
    layers, error = taken(trained(Tokens(Recurrent())), flow)
    left = layers["body.gru"]
    assert (left.kind, left.int8) == ("recurrent", False)
    assert (
        left.reason
        == {
            FlowName.fx: "flow=fx has no INT8 module for GRU",
            FlowName.dynamic: "flow=dynamic quantizes linear layers only",
        }[flow]
    )
    assert error < 0.1


def test_an_lstm_is_int8_in_eager_mode() -> None:
    layers, error = taken(trained(Tokens(Recurrent(nn.LSTM))), FlowName.eager)
    assert int8(layers) == set(layers)
    assert sum("igates" in name or "hgates" in name for name in layers) == 2
    assert error < 0.1


def test_a_linear_layer_that_dynamic_does_not_take_is_not_said_to_be_no_linear_layer() -> None:
    class Own(nn.Linear):
        pass

    layers, _ = taken(trained(Tokens(Own(16, 16))), FlowName.dynamic)
    assert int8(layers) == {"head"}
    assert layers["body"].reason == "flow=dynamic quantizes torch.nn.Linear alone, and this is a Own"
    assert layers["patches"].reason == "flow=dynamic quantizes linear layers only"


def test_weights_that_are_computed_are_told_from_constant_ones() -> None:
    class Conditional(nn.Module):
        """The weights of its linear layer are mixed for each batch."""

        def __init__(self) -> None:
            super().__init__()
            self.route = nn.Linear(3, 2)
            self.experts = nn.Parameter(torch.randn(2, 10, 8) * 0.2)
            self.register_buffer("kernel", torch.randn(8, 3, 3, 3) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            share = torch.softmax(self.route(x.mean((2, 3))), 1).mean(0)
            x = F.relu(F.conv2d(x, self.kernel)).mean((2, 3))
            return F.linear(x, (share[:, None, None] * self.experts).sum(0))

    layers, error = converted(trained(Conditional()), FlowName.fx)
    left = [layer for layer in layers.values() if not layer.int8]
    assert [layer.kind for layer in layers.values()] == ["linear", "conv", "linear"]
    assert [(layer.kind, layer.reason) for layer in left] in (
        [],  # a torch that packs weights at each call
        [("linear", "its weights are computed by the model, not constant")],
    )
    assert error < 0.1


def test_only_what_never_runs_is_said_never_to_run() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head, self.auxiliary = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(8, 10)
            self.again = self.trunk
            self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.again(x)).mean((2, 3))
            return self.head(x) + self.auxiliary(x) if self.training else self.head(x)

    layers, _ = taken(trained(Auxiliary()), FlowName.eager)
    assert int8(layers) == {"trunk", "head"}
    left = {name: layer.reason for name, layer in layers.items() if not layer.int8}
    assert set(left) == {"auxiliary", "mixer.in_proj", "mixer.out_proj"}
    assert set(left.values()) == {"never runs in evaluation"}


# ------------------------------------------------------------------------------ what is said, and what is executed


class Own(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Between(nn.Module):
    """A layer between two that every flow but one quantizes. shape: of what it takes, without the images."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.layer, self.shape = nn.Conv2d(3, 16, 4, 4), layer, shape
        with torch.no_grad():
            size = layer(torch.zeros(2, *shape)).flatten(1).shape[1]
        self.head = nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer(x if self.shape == MAPS else x.reshape(-1, *self.shape))
        return self.head(x.flatten(1))


KINDS: dict[str, Callable[[], Between]] = {
    **{
        f"Conv2d {name}": lambda more=more: Between(nn.Conv2d(16, 16, **{"kernel_size": 3} | more), MAPS)
        for name, more in {
            "dense": {},
            "pointwise": {"kernel_size": 1},
            "depthwise": {"groups": 16},
            "grouped": {"groups": 4},
            "dilated": {"dilation": 2, "padding": 2},
            "strided": {"stride": 2},
            "reflected": {"padding": 1, "padding_mode": "reflect"},
            "replicated": {"padding": 1, "padding_mode": "replicate"},
            "same": {"padding": "same"},
            "without bias": {"bias": False},
        }.items()
    },
    "Conv1d": lambda: Between(nn.Conv1d(16, 8, 3), (16, 16)),
    "Conv3d": lambda: Between(nn.Conv3d(4, 4, (1, 3, 3)), (4, 4, 4, 4)),
    "Conv3d depthwise": lambda: Between(nn.Conv3d(4, 4, (1, 3, 3), groups=4), (4, 4, 4, 4)),
    **{
        f"ConvTranspose2d {name}": lambda more=more: Between(nn.ConvTranspose2d(16, 16, 3, **more), MAPS)
        for name, more in {
            "dense": {},
            "strided": {"stride": 2},
            "grouped": {"groups": 4},
            "depthwise": {"groups": 16},
            "padded": {"stride": 2, "output_padding": 1},
            "dilated": {"dilation": 2},
        }.items()
    },
    "ConvTranspose1d": lambda: Between(nn.ConvTranspose1d(16, 8, 3), (16, 16)),
    "ConvTranspose3d": lambda: Between(nn.ConvTranspose3d(4, 4, (1, 3, 3)), (4, 4, 4, 4)),
    "Linear": lambda: Between(nn.Linear(16, 8), (16, 16)),
    "Linear without bias": lambda: Between(nn.Linear(16, 8, bias=False), (16, 16)),
    "own forward": lambda: Between(Own(16, 8, 3), MAPS),
    "BatchNorm1d": lambda: Between(nn.BatchNorm1d(16), (16, 16)),
    "BatchNorm2d": lambda: Between(nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(16)), MAPS),
    "BatchNorm2d and ReLU": lambda: Between(nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU()), MAPS),
    "BatchNorm3d": lambda: Between(nn.BatchNorm3d(4), (4, 4, 4, 4)),
    "folded": lambda: Between(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), MAPS),
    "folded transposed": lambda: Between(nn.Sequential(nn.ConvTranspose2d(16, 8, 3), nn.BatchNorm2d(8)), MAPS),
    "folded linear": lambda: Between(nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8)), MAPS),
    "GRU": lambda: Between(Recurrent(), (16, 16)),
    "RNN": lambda: Between(Recurrent(nn.RNN), (16, 16)),
    "LSTM": lambda: Between(Recurrent(nn.LSTM), (16, 16)),
    "attention": lambda: Between(Attention(batch_first=False), (16, 16)),
    "encoder": lambda: Between(encoder(), (16, 16)),
}
MAPS = (16, 4, 4)
REFUSED_BY_EAGER = ("Conv2d replicated", "own forward", "BatchNorm1d", "GRU", "RNN", "encoder")
REFUSED_BY_QNNPACK = ("Conv3d", "Conv3d depthwise")
# torch's conv1d of QNNPACK doesn't take every watched call.
CASES = [
    (k, f, e) for k in KINDS for f in BY_TORCH for e in quantize.supported() if (k, e) != ("Conv1d", Engine.qnnpack)
]
_WEIGHTED = ("conv", "linear", "batch_norm", "addmm", "mm", "bmm", "rnn", "gru", "lstm", "attention")


class Executed(DispatchMode):
    """Notes for each operator with weights if it takes INT8, by the name of the innermost module with a row."""

    def __init__(self, model: nn.Module, rows: set[str]) -> None:
        super().__init__()
        self.stack, self.rows, self.int8 = [""], rows, dict[str, set[bool]]()
        for name, module in model.named_modules():
            label = public(name, model)
            module.register_forward_pre_hook(partial(self._enter, label))
            module.register_forward_hook(self._leave)

    def _enter(self, label: str, *_: Any) -> None:
        self.stack.append(label)

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if any(word in name for word in _WEIGHTED) and "prepack" not in name:
            where = next((label for label in reversed(self.stack) if label in self.rows), "")
            self.int8.setdefault(where, set()).add(space == "quantized")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "flow", "engine"), CASES)
def test_a_layer_is_said_to_be_int8_just_where_its_operator_is(kind: str, flow: FlowName, engine: Engine) -> None:
    net = trained(KINDS[kind]())
    by_qnnpack = engine is Engine.qnnpack and flow is not FlowName.dynamic and kind in REFUSED_BY_QNNPACK
    if by_qnnpack or (flow is FlowName.eager and kind in REFUSED_BY_EAGER):
        with pytest.raises(InputError):
            quantize.dry_run(net, FLOWS[flow], spec(SETTINGS, engine=engine), TWO)
        return
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), TWO), spec(SETTINGS, engine=engine), TWO)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, [TWO])
    model = FLOWS[flow].convert(prepared).module
    rows = {layer.name: layer for layer in torch_layers.layers(model, FLOWS[flow], engine)}
    with quantize.engine(engine), torch.no_grad(), Executed(model, set(rows)) as executed:
        model(TWO)
    # What attention does between its projections has no weights, and the projections of a whole call no modules.
    within = {name for name, layer in rows.items() if layer.reason.startswith("part of a ")}
    assert not any(rows[name].int8 for name in within)
    assert executed.int8.pop("", {False}) == {False}
    assert {name: kinds for name, kinds in executed.int8.items() if name not in within} == {
        name: {layer.int8} for name, layer in rows.items() if name not in within
    }
