"""Activations of 2 to 7 bits: what is executed has no other codes, and is what a fake-quantized float network gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import convert as torch_convert
from torch.ao.quantization.quantize_fx import convert_fx

from qexp import quantize
from qexp.config.schema import Engine, FlowName, Observer, RuntimeName
from qexp.errors import InputError, RunError
from qexp.models import architectures
from qexp.quantize import FLOWS, Prepared
from qexp.quantize.inspection.executed_operators import beyond, executed
from qexp.quantize.torch_backend import emulation
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.quantize.torch_backend.ignored_quant_max import clamped, quant_max_of
from qexp.quantize.torch_backend.layer_equivalence import check_layers
from qexp.quantize.torch_backend.layer_errors import layer_fidelity
from qexp.records import QParams
from qexp.runtimes import RUNTIMES
from tests.helpers.quantizable import MINMAX, RECORDED, Plain, assembled, images, settings, spec, trained

EAGER = RUNTIMES[RuntimeName.eager]
TORCHSCRIPT = RUNTIMES[RuntimeName.torchscript]
BOTH = [FlowName.eager, FlowName.fx]
BITS = range(2, 8)
SEEN = images(8, seed=3)
WIDER = images(8, seed=4) * 3  # beyond what calibration saw


class Gated(nn.Module):
    """Convolutions, a residual sum, pooling, and a gate of sigmoid, whose grid is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.add = FloatFunctional()
        self.gate = nn.Conv2d(8, 8, 1)
        self.sigmoid = nn.Sigmoid()
        self.mul = FloatFunctional()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.add.add(x, self.conv2(x))
        x = self.mul.mul(x, self.sigmoid(self.gate(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Odd(nn.Module):
    """Other operations of a traced model: fixed grids of all kinds, numbers, concatenation, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.hardsigmoid, self.sigmoid, self.tanh = nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh()
        self.softmax, self.norm = nn.Softmax(1), nn.LayerNorm(14)
        self.leaky, self.hardswish, self.elu = nn.LeakyReLU(), nn.Hardswish(), nn.ELU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        swish = x * F.relu6(x + 3) / 6
        y = torch.cat([x + self.hardsigmoid(x), self.sigmoid(x) * self.tanh(x) * swish, x * -0.5, self.softmax(x)], 1)
        y = y[:, :8] * self.norm(x) + self.leaky(x) + self.hardswish(x) + self.elu(x) + x.sigmoid() + torch.tanh(x)
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def prepared(
    net: nn.Module, flow: FlowName, observer: Observer = MINMAX, engine: Engine = Engine.x86, **wanted: Any
) -> Prepared:
    fused = FLOWS[flow].fuse(net, spec(), SEEN)
    made = FLOWS[flow].prepare(fused, spec(settings(**wanted), observer, engine), SEEN)
    quantize.calibrate(made, [SEEN])
    return made


def converted(net: nn.Module, flow: FlowName, bits: int, engine: Engine = Engine.x86, **wanted: Any) -> nn.Module:
    return FLOWS[flow].convert(prepared(net, flow, engine=engine, activation_bits=bits, **wanted)).module


def run(model: Callable[[Tensor], Tensor], batch: Tensor, engine: Engine = Engine.x86) -> Tensor:
    with quantize.engine(engine), torch.inference_mode():
        return model(batch)


@contextmanager
def modules_watched(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda module, given, output: see(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def largest_codes(model: nn.Module, batch: Tensor, engine: Engine = Engine.x86) -> dict[str, int]:
    """The largest code of every quantized tensor that a module, or a node of a graph, gives."""
    found: dict[str, int] = {}

    def see(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_quantized:
            found[name] = max(found.get(name, 0), int(output.int_repr().max()))

    class Nodes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            output = super().run_node(n)
            see(f"node {n.name}", output)
            return output

    with modules_watched(model, see):
        run(Nodes(model).run if isinstance(model, fx.GraphModule) else model, batch, engine)
    return found


NETS: dict[str, tuple[Callable[[], nn.Module], list[FlowName]]] = {
    "gated": (Gated, BOTH), "tiny": (architectures.tiny, BOTH), "plain": (Plain, [FlowName.fx]),
    "odd": (Odd, [FlowName.fx]),
}  # fmt: skip
CASES = [(name, flow) for name, (_, flows) in NETS.items() for flow in flows]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "flow"), CASES)
def test_no_tensor_has_a_code_beyond_the_bits_asked_for(name: str, flow: FlowName, bits: int) -> None:
    net = trained(NETS[name][0]())
    model = converted(net, flow, bits)
    codes = largest_codes(model, WIDER)
    assert max(codes.values()) == 2**bits - 1 == quant_max_of(model)
    assert len(codes) > 6
    assert beyond(model, Engine.x86, WIDER, 2**bits - 1) == ""
    check_layers(assembled(FLOWS[flow].fuse(net, spec(), SEEN), model, flow), WIDER)


@pytest.mark.parametrize("engine", [Engine.qnnpack, Engine.onednn])
@pytest.mark.parametrize("flow", BOTH)
def test_the_ends_hold_on_every_engine(flow: FlowName, engine: Engine) -> None:
    model = converted(trained(Gated()), flow, 4, engine)
    assert max(largest_codes(model, WIDER, engine).values()) == 15
    expected = run(converted(trained(Gated()), flow, 4), WIDER)
    # With so small codes no sum overflows anywhere, so engines differ by rounding.
    assert (run(model, WIDER, engine) - expected).abs().mean() < 0.02 * expected.abs().max()


# ------------------------------------------------------------------------------------------------ a float reference


def fake(values: Tensor, low: float, high: float, bits: int) -> Tensor:
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = (high - low) / top
    zero_point = round(-low / scale)
    return ((values / scale).round() + zero_point).clamp(0, top).sub(zero_point) * scale


def fake_weight(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


def gated(net: Gated, x: Tensor, weight: Callable[[Tensor], Tensor], grid: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The output of `Gated`, with weights and tensors quantized by the given functions."""
    x = grid("input", x)
    x = F.max_pool2d(grid("conv1", F.conv2d(x, weight(net.conv1.weight), net.conv1.bias, padding=1).relu()), 2)
    x = grid("add", x + grid("conv2", F.conv2d(x, weight(net.conv2.weight), net.conv2.bias, padding=1)))
    gate = grid("gate", F.conv2d(x, weight(net.gate.weight), net.gate.bias))
    x = grid("mul", x * grid("sigmoid", gate.sigmoid()))
    x = grid("mul", x.mean((2, 3)))
    return grid("fc", F.linear(x, weight(net.fc.weight), net.fc.bias))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("flow", BOTH)
def test_logits_are_those_of_a_fake_quantized_float_network(flow: FlowName, bits: int) -> None:
    net = trained(Gated())
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str, values: Tensor) -> Tensor:
        ranges.setdefault(name, (float(values.min()), float(values.max())))
        return values

    assert isinstance(net, Gated)
    gated(net, SEEN, lambda weight: weight, observe)
    ranges["sigmoid"] = (0.0, (2**bits - 1) / 2**bits)
    expected = gated(net, WIDER, fake_weight, lambda name, values: fake(values, *ranges[name], bits))

    actual = run(converted(net, flow, bits), WIDER)
    step = (max(ranges["fc"][1], 0) - min(ranges["fc"][0], 0)) / (2**bits - 1)
    # A value half way between two steps may go to either, and takes what hangs on it along.
    assert ((actual - expected).abs() > 0.01 * step).float().mean() < 0.1
    assert (actual - expected).abs().max() < 1.01 * step
    assert expected.std() > step / 2  # they are not all the same


@pytest.mark.parametrize("bits", [2, 4])
def test_a_sum_with_a_number_has_the_bits_asked_for(bits: int) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + 3) * -0.5

    net, top = trained(Shifted()), 2**bits - 1
    model = converted(net, FlowName.fx, bits)
    q = torch_layers.read_qparams(prepared(net, FlowName.fx, activation_bits=bits).module)
    values = run(model, WIDER)
    conv = net.conv(SEEN)  # type: ignore[operator]
    low, high = min(float(conv.min()), 0.0), max(float(conv.max()), 0.0)
    assert q["conv"].scale[0] == pytest.approx((high - low) / top, rel=1e-5)
    # Of each sum there is the range of the convolution, moved by 3 and spread over the same number of steps.
    zero_point = int(q["conv"].zero_point[0])
    ends = [(code - zero_point) * float(q["conv"].scale[0]) + 3 for code in (0, top)]
    step = (max(ends[1], 0) - min(ends[0], 0)) / top
    assert len(values.unique()) <= top + 1
    exact = (fake(net.conv(fake(WIDER, float(SEEN.min()), float(SEEN.max()), bits)), low, high, bits) + 3) * -0.5  # type: ignore[operator]
    assert ((values - exact).abs() > 0.51 * 0.5 * step).float().mean() < 0.02


# ------------------------------------------------------------------------------------------------ 8 bits, and files


@pytest.mark.parametrize("flow", BOTH)
def test_with_8_bits_it_is_the_model_that_torch_converts(flow: FlowName) -> None:
    net = trained(architectures.tiny())
    engine = Engine.fbgemm
    made = prepared(net, flow, engine=engine).module
    with quantize.engine(engine), known_deprecations_silenced():
        by_torch = torch_convert(made) if flow is FlowName.eager else convert_fx(made)  # type: ignore[arg-type]
    ours = FLOWS[flow].convert(prepared(net, flow, engine=engine)).module
    assert torch.equal(run(ours, WIDER, engine), run(by_torch, WIDER, engine))
    assert executed(ours, engine, SEEN) == executed(by_torch, engine, SEEN)
    assert quant_max_of(ours) == 255
    assert max(largest_codes(ours, WIDER, engine).values()) == 255


@pytest.mark.parametrize("engine", [Engine.x86, Engine.qnnpack])
@pytest.mark.parametrize(("name", "flow"), CASES)
def test_what_is_saved_gives_the_same_logits(name: str, flow: FlowName, engine: Engine, tmp_path: Path) -> None:
    net = trained(NETS[name][0]())
    model = converted(net, flow, 4, engine)
    expected = run(model, WIDER, engine)
    fused = FLOWS[flow].fuse(net, spec(), SEEN)
    blank = quantize.skeleton(fused, FLOWS[flow], spec(settings(activation_bits=4), engine=engine), SEEN)
    with quantize.engine(engine), warnings.catch_warnings():
        # A reader of a run's output can't act on what tracing says.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="All inputs of this cat operator must share")
        path = EAGER.export(model, SEEN[:2], tmp_path / "state.pt")
        traced = TORCHSCRIPT.load(TORCHSCRIPT.export(model, SEEN[:2], tmp_path / "traced.pt"), nn.Identity, engine)
    loaded = EAGER.load(path, lambda: blank, engine)
    assert torch.equal(run(loaded, WIDER, engine), expected)
    assert torch.equal(run(loaded.copies(1)[0], WIDER, engine), expected)
    assert torch.equal(run(traced, WIDER, engine), expected)
    assert torch.equal(run(traced, WIDER[:1], engine), run(model, WIDER[:1], engine))


@pytest.mark.parametrize("kind", [nn.ELU(), nn.Softmax(1), nn.PReLU(3)])
def test_scales_that_torch_leaves_out_are_saved(kind: nn.Module) -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 3, 3), kind, nn.Flatten(), nn.Linear(3 * 14 * 14, 10)))
    model = converted(net, FlowName.fx, 8)
    blank = quantize.skeleton(FLOWS[FlowName.fx].fuse(net, spec(), SEEN), FLOWS[FlowName.fx], spec(), SEEN)
    blank.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(blank, WIDER), run(model, WIDER))


def test_clamping_keeps_the_memory_format_on_every_engine() -> None:
    plain = torch.quantize_per_tensor(torch.randn(2, 5, 3, 4), 0.1, 20, torch.quint8)
    for made in (plain, plain.contiguous(memory_format=torch.channels_last), plain[:, :1], plain.flatten(1)):
        expected = made.int_repr().clamp(max=23)
        for engine in quantize.supported():
            with quantize.engine(engine):
                answer = clamped(made, 23)
            assert torch.equal(answer.int_repr(), expected)
            assert answer.q_zero_point() == 20
            if made.is_contiguous(memory_format=torch.contiguous_format):
                assert answer.stride() == made.stride()


@pytest.mark.parametrize("flow", BOTH)
def test_a_clamp_is_executed_and_its_end_depends_on_no_range(flow: FlowName) -> None:
    net, on = trained(architectures.tiny()), (Engine.x86, SEEN[:1])
    by_range = {
        executed(FLOWS[flow].convert(prepared(net, flow, RECORDED[observer], activation_bits=4)).module, *on)
        for observer in ("minmax", "mse")
    }
    assert len(by_range) == 1
    assert executed(converted(net, flow, 8), *on) not in by_range


# ------------------------------------------------------------------------------------------------ who else must agree


@pytest.mark.parametrize("flow", BOTH)
def test_parameters_and_clipping_are_those_of_what_is_executed(flow: FlowName) -> None:
    net = trained(Gated())
    made = prepared(net, flow, RECORDED["percentile"], activation_bits=5)
    q = torch_layers.read_qparams(made.module)
    assert {(one.qmin, one.qmax) for name, one in q.items() if not name.endswith("weight")} == {(0, 31)}
    model = FLOWS[flow].convert(made).module
    fused = FLOWS[flow].fuse(net, spec(), SEEN)
    rows = {row.name: row for row in layer_fidelity(assembled(fused, model, flow), [WIDER])}
    values = net.conv1(WIDER).relu()  # type: ignore[operator]
    end = (32 - int(q["conv1"].zero_point[0])) * float(q["conv1"].scale[0])
    assert rows["conv1"].clipped == pytest.approx(float((values > end).float().mean()), abs=1e-4)
    assert rows["conv1"].clipped > 0.01
    # The layer by itself: the codes of its input and its output are clamped, too.
    x = fake(WIDER, *_ends(q["quant" if flow is FlowName.eager else "x"]), 5)
    answer = fake(F.conv2d(x, fake_weight(net.conv1.weight), net.conv1.bias, padding=1).relu(), *_ends(q["conv1"]), 5)  # type: ignore[operator, arg-type, union-attr]
    error = 10 * torch.log10(values.square().sum() / (answer - values).square().sum())
    assert rows["conv1"].own_sqnr_db == pytest.approx(float(error), abs=0.05)


def _ends(q: QParams) -> tuple[float, float]:
    scale, zero_point = float(q.scale[0]), int(q.zero_point[0])
    return (q.qmin - zero_point) * scale, (q.qmax - zero_point) * scale


@pytest.mark.parametrize("engine", [Engine.x86, Engine.onednn])
@pytest.mark.parametrize("flow", BOTH)
def test_exact_and_emulated_sums_see_the_codes_that_are_executed(flow: FlowName, engine: Engine) -> None:
    net = trained(Gated())
    made = prepared(net, flow, engine=engine, activation_bits=6)
    model = FLOWS[flow].convert(made).module
    emulated = emulation.with_emulated_accumulators(model, engine)
    for other in (emulated, quantize.exact(made)):
        assert max(largest_codes(other, WIDER, engine).values()) == 63
        rows = emulation.layer_by_layer(model, other, [WIDER], engine)
        assert len(rows) == 4
        assert not any(row.saturates for row in rows)
    assert emulation.not_emulated(model) == ()
    assert not emulation.at_risk(model, engine, {"conv", "pointwise", "linear"})
    assert emulation.at_risk(converted(net, flow, 8), engine, {"conv", "pointwise", "linear"})


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("flow", BOTH)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_weights_end_where_their_grid_does(flow: FlowName, observer: str, bits: int) -> None:
    model = converted(trained(Gated()), flow, 8, weight_bits=bits, weight_observer=observer)
    for name, layer in emulation.int8_layers(model):
        codes = layer.weight().int_repr()  # type: ignore[operator]
        assert codes.min() == -(2 ** (bits - 1)), name
        assert codes.max() == 2 ** (bits - 1) - 1, name


@pytest.mark.parametrize("flow", BOTH)
def test_a_layer_that_ends_before_its_bits_do_is_found(flow: FlowName) -> None:
    net = trained(Gated())
    model = converted(net, flow, 8, overflow="weights")
    layer = model.get_submodule("conv1" if flow is FlowName.fx else "module.conv1")
    forward = layer.forward
    vars(layer)["forward"] = lambda given: clamped(forward(given), 127)
    with pytest.raises(RunError, match="conv1"):
        check_layers(assembled(FLOWS[flow].fuse(net, spec(), SEEN), model, flow), WIDER)


class Functional(nn.Module):
    """Asks torch for a sigmoid where the eager flow can't see it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.sigmoid(self.conv(x)).mean((2, 3)))
        return logits


def test_an_operation_whose_bits_the_eager_flow_cannot_choose_is_refused() -> None:
    def tried(flow: FlowName, bits: int) -> None:
        quantize.dry_run(Functional(), FLOWS[flow], spec(settings(activation_bits=bits)), SEEN)

    with pytest.raises(InputError, match=r"keep the output of sigmoid within qconfig.activation.bits=4.*flow=fx"):
        tried(FlowName.eager, 4)
    tried(FlowName.eager, 8)
    tried(FlowName.fx, 4)
