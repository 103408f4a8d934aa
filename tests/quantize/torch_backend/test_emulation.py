"""Emulated 16-bit accumulators: against a loop over pairs, against the kernels, and in whole models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName
from qexp.errors import InputError
from qexp.models import architectures
from qexp.quantize import FLOWS
from qexp.quantize.saturation import accumulators, kernels
from qexp.quantize.saturation.kernels import probe
from qexp.quantize.torch_backend import emulation
from qexp.quantize.torch_backend.qnnpack_biases import fit_biases
from tests.helpers.quantizable import Chain, images, relative_error, settings, spec, trained

ENGINES = [e for e in (Engine.x86, Engine.fbgemm, Engine.onednn) if e in quantize.supported()]
# x86 is FBGEMM too, wherever there is no VNNI.
ONE_OF_EACH = [e for e in ENGINES if e is not Engine.fbgemm]

SHAPES: dict[str, dict] = {
    # name: channels in and out, and what nn.Conv2d takes; no kernel_size: linear
    "conv": {"of": (16, 24), "kernel_size": 3, "padding": 1},
    "stem": {"of": (3, 33), "kernel_size": 7, "padding": 3, "stride": 2},
    "odd": {"of": (5, 19), "kernel_size": (3, 1), "padding": (1, 0), "dilation": 2},
    "deep": {"of": (256, 8), "kernel_size": 3, "padding": 1, "stride": 2},
    "pointwise": {"of": (17, 40), "kernel_size": 1},
    "strided pointwise": {"of": (64, 24), "kernel_size": 1, "stride": 2},
    "grouped": {"of": (32, 16), "kernel_size": 3, "padding": 1, "groups": 4},
    "odd groups": {"of": (18, 36), "kernel_size": 3, "padding": 1, "groups": 6},
    "depthwise": {"of": (32, 32), "kernel_size": 3, "padding": 1, "groups": 32},
    "depthwise 5x5": {"of": (24, 24), "kernel_size": 5, "stride": 2, "padding": 2, "groups": 24},
    "linear": {"of": (40, 30)},
    "odd linear": {"of": (41, 10)},
    "long linear": {"of": (513, 10)},
    "longer linear": {"of": (1281, 10)},
}
# What `saturation.probe` calls the kernel that computes them.
PROBED = {
    "stem": "stem",
    "pointwise": "pointwise",
    "strided pointwise": "pointwise",
    "grouped": "grouped",
    "odd groups": "grouped",
    "depthwise": "depthwise",
    "depthwise 5x5": "depthwise_5x5",
}


def kind(shape: str) -> str:
    return "linear" if "linear" in shape else PROBED.get(shape, "conv")


def layer(
    shape: str, engine: Engine, relu: bool = False, per_channel: bool = True, extreme: bool = False, zero_point: int = 0
) -> tuple[nn.Module, Tensor]:
    """An INT8 layer with random or extreme weights (and their zero point), and a quantized input for it."""
    generator = torch.Generator().manual_seed(3)
    arguments = dict(SHAPES[shape])
    channels_in, channels_out = arguments.pop("of")
    if "kernel_size" in arguments:
        module = (nniq.ConvReLU2d if relu else nnq.Conv2d)(channels_in, channels_out, **arguments)
        size, inputs = (channels_out, channels_in // module.groups, *module.kernel_size), (2, channels_in, 9, 9)
    else:
        module = (nniq.LinearReLU if relu else nnq.Linear)(channels_in, channels_out)
        size, inputs = (channels_out, channels_in), (5, channels_in)
    weight = torch.randint(-128, 128, size, generator=generator)
    values = torch.randint(0, 256, inputs, generator=generator)
    if extreme:
        weight = torch.where(torch.rand(size, generator=generator) < 0.6, 127, -128)
        values = torch.where(torch.rand(inputs, generator=generator) < 0.7, 255, values)
    scales = torch.rand(channels_out, generator=generator) * 0.01 + 0.001
    with quantize.engine(engine):
        module.set_weight_bias(
            packed(weight.to(torch.int8), scales, per_channel, zero_point), torch.randn(channels_out)
        )
    module.scale = float(0.037 * scales.mean() * 140 * weight[0].numel() ** 0.5)
    module.zero_point = 100
    quantized = torch._make_per_tensor_quantized_tensor(values.to(torch.uint8), 0.037, 77)
    if extreme:
        # Mostly of one sign: what they add up to grows with their number, wherever it is added up exactly.
        with quantize.engine(engine), torch.inference_mode():
            module.scale *= 20
            low, high = (float(value) for value in module(quantized).dequantize().aminmax())
        module.scale = (high - low) / 200
        module.zero_point = max(0, min(round(-low / module.scale), 255))
    return module, quantized


def packed(weight: Tensor, scales: Tensor, per_channel: bool, zero_point: int) -> Tensor:
    if not per_channel:
        return torch._make_per_tensor_quantized_tensor(weight, float(scales[0]), zero_point)
    return torch._make_per_channel_quantized_tensor(weight, scales, torch.full((len(scales),), zero_point), 0)


def emulated(module: nn.Module, engine: Engine, saturating: bool = True) -> nn.Module:
    return emulation.with_emulated_accumulators(nn.Sequential(module), engine, saturating)


def steps(actual: Tensor, expected: Tensor) -> int:
    assert actual.q_scale() == expected.q_scale()
    assert actual.q_zero_point() == expected.q_zero_point()
    return int((actual.int_repr().int() - expected.int_repr().int()).abs().max())


def executed(module: nn.Module, engine: Engine, inputs: Tensor) -> Tensor:
    with quantize.engine(engine), torch.inference_mode():
        return module(inputs)


def check_against_execution(shape: str, engine: Engine, asymmetric: bool = False, **how: bool) -> None:
    """The emulation has the outputs of this machine's kernels, saturating or exact as the probe found them."""
    module, inputs = layer(shape, engine, zero_point=-5 if asymmetric else 0, **how)
    scheme = settings(weight_scheme="asymmetric" if asymmetric else "symmetric").weight.scheme
    saturating = kind(shape) in probe().saturating_kinds(engine, scheme)
    answer = executed(module, engine, inputs)
    assert answer.int_repr().float().std() > 5
    # With VNNI, x86 has oneDNN round what FBGEMM rounds without.
    allowed = 0 if saturating or engine is Engine.fbgemm else 1
    away = steps(answer, emulated(module, engine, saturating)(inputs))
    if not saturating and "groups" in SHAPES[shape]:
        # FBGEMM has kernels of its own for groups with padding, which the probe has not tried.
        away = min(away, steps(answer, emulated(module, engine)(inputs)))
    assert away <= allowed


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("engine", ENGINES)
def test_layers_are_what_the_kernels_execute(engine: Engine, shape: str) -> None:
    check_against_execution(shape, engine)
    check_against_execution(shape, engine, relu=True, extreme=True)
    check_against_execution(shape, engine, per_channel=False)


@pytest.mark.parametrize("shape", ["conv", "grouped", "depthwise", "linear"])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e is not Engine.onednn])
def test_so_are_asymmetric_weights(engine: Engine, shape: str) -> None:
    check_against_execution(shape, engine, asymmetric=True)
    check_against_execution(shape, engine, asymmetric=True, per_channel=False)


def looped(module: nnq.Conv2d | nnq.Linear, inputs: Tensor, engine: Engine) -> np.ndarray:
    """Real-valued outputs by a loop over outputs and terms, with 16-bit sums of pairs as in the kernels' sources."""
    weight = module.weight().int_repr().numpy().astype(int)
    values, zero = inputs.int_repr().numpy().astype(int), inputs.q_zero_point()
    if weight.ndim == 2:
        weight, values = weight[:, :, None, None], values[:, :, None, None]
        stride, padding, dilation, groups = (1, 1), (0, 0), (1, 1), 1
    else:
        stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    (rows, columns), (top, left) = weight.shape[2:], padding
    values = np.pad(values, ((0, 0), (0, 0), (top, top), (left, left)), constant_values=zero)
    out = [(values.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    answers = np.zeros((len(values), len(weight), *out))
    channels = weight.shape[1]
    for n, o, y, x in np.ndindex(*answers.shape):
        first = o // (len(weight) // groups) * channels
        total, waiting = 0, []
        for r in range(rows):
            for c in range(columns):
                for channel in range(channels):
                    at = values[n, first + channel, y * stride[0] + r * dilation[0], x * stride[1] + c * dilation[1]]
                    waiting.append(at * weight[o, channel, r, c])
                    total -= zero * weight[o, channel, r, c]
                    tap_ends = engine is Engine.onednn and channel == channels - 1
                    if len(waiting) == 2 or tap_ends:
                        total += max(-(2**15), min(2**15 - 1, sum(waiting)))
                        waiting = []
        answers[n, o, y, x] = total + max(-(2**15), min(2**15 - 1, sum(waiting)))
    scale = module.weight().q_per_channel_scales().numpy() * inputs.q_scale()
    real = answers * scale[:, None, None] + module.bias().detach().numpy()[:, None, None]
    return real.reshape(real.shape[:2]) if module.weight().dim() == 2 else real


@pytest.mark.parametrize("shape", ["odd", "depthwise", "linear", "odd linear", "pointwise"])
@pytest.mark.parametrize("engine", ENGINES)
def test_emulation_is_a_loop_over_pairs_on_any_machine(engine: Engine, shape: str) -> None:
    module, inputs = layer(shape, engine, extreme=True)
    inputs = inputs[:1, :, :5, :5] if inputs.dim() == 4 else inputs
    expected = looped(module, inputs, engine) / module.scale + module.zero_point
    actual = emulated(module, engine)(inputs).int_repr().numpy()
    halfway = np.abs(expected - np.floor(expected) - 0.5) < 1e-3
    assert halfway.mean() < 0.1
    assert np.array_equal(np.where(halfway, 0, actual), np.where(halfway, 0, np.clip(np.round(expected), 0, 255)))


def test_exact_sums_are_those_of_qnnpack() -> None:
    module, inputs = layer("conv", ENGINES[0], extreme=True)
    exact = emulated(module, ENGINES[0], saturating=False)(inputs)
    saturated = emulated(module, ENGINES[0])(inputs)
    with quantize.engine(Engine.qnnpack):
        module.set_weight_bias(module.weight(), module.bias())
    # qnnpack rounds biases to integers.
    assert steps(exact, executed(module, Engine.qnnpack, inputs)) <= 1
    assert steps(saturated, exact) > 5


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {}
    for shape in ("conv", "grouped", "linear"):
        module, inputs = layer(shape, ENGINES[0], extreme=True)
        whole[shape] = (emulated(module, ENGINES[0]), inputs)
    expected = {shape: module(inputs) for shape, (module, inputs) in whole.items()}
    monkeypatch.setattr(accumulators, "_CHUNK", 1 << 12)
    assert all(steps(module(inputs), expected[shape]) == 0 for shape, (module, inputs) in whole.items())


# ------------------------------------------------------------------------------------------------ the static bound


@pytest.mark.parametrize(("first", "second"), [(64, 64), (65, 64), (127, 127), (-64, -64), (-65, -64), (-128, 127)])
def test_a_pair_can_overflow_if_some_activations_make_it(first: int, second: int) -> None:
    pairs = torch.tensor([[[first, second]]], dtype=torch.int16)
    for high_first, high_second in ((255, 255), (127, 255), (100, 30)):
        possible = [a * first + b * second for a in (0, high_first) for b in (0, high_second)]
        expected = max(possible) > 32767 or min(possible) < -32768
        highest = torch.tensor([[[high_first, high_second]]], dtype=torch.int32)
        assert bool(emulation.overflowing(pairs, highest)) == expected
    assert bool(emulation.overflowing(pairs)) == (abs(first + second) > 128 and first * second > 0)


@pytest.mark.parametrize("shape", ["conv", "odd", "grouped", "depthwise", "linear"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_pair_that_can_overflow_means_exact_sums(engine: Engine, shape: str) -> None:
    module, inputs = layer(shape, engine, extreme=True)
    # oneDNN's depthwise weights have no neighbours.
    assert emulation.can_overflow(module, engine) == bool(emulation.weight_pairs(module, engine)[..., 1].any())
    assert not emulation.can_overflow(module, Engine.qnnpack)
    weight = module.weight().int_repr() // 2  # -64 to 63
    with quantize.engine(engine):
        module.set_weight_bias(packed(weight, torch.full((len(weight),), 0.01), True, 0), module.bias())
    assert not emulation.can_overflow(module, engine)
    assert steps(emulated(module, engine)(inputs), emulated(module, engine, saturating=False)(inputs)) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_pairs_are_neighbours_in_the_order_of_the_kernel(engine: Engine) -> None:
    module, _ = layer("conv", engine)
    weight = torch.zeros(24, 16, 3, 3)
    weight[5, 6:8, 1, 2] = 100
    with quantize.engine(engine):
        module.set_weight_bias(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None)
    pairs = emulation.weight_pairs(module, engine)
    assert pairs.shape == (24, 72, 2)
    assert pairs[5, 5 * 8 + 3].tolist() == [100, 100]  # tap (1, 2) is the sixth of nine, with eight pairs each
    assert emulation.can_overflow(module, engine)
    weight[5, 6:8, 1, 2] = torch.tensor([100.0, 28.0])
    with quantize.engine(engine):
        module.set_weight_bias(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None)
    assert not emulation.can_overflow(module, engine)


@pytest.mark.parametrize("shape", ["conv", "odd", "pointwise", "grouped", "odd groups", "depthwise", "odd linear"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_largest_activation_of_each_channel_tells_whether_sums_can_overflow(engine: Engine, shape: str) -> None:
    module, inputs = layer(shape, engine)
    weight, scales = module.weight().int_repr(), torch.full((len(module.weight()),), 0.01)
    bias, groups = module.bias(), getattr(module, "groups", 1)

    def pairs_of(weight: Tensor) -> list:
        with quantize.engine(engine):
            module.set_weight_bias(packed(weight, scales, True, 0), bias)
        return emulation.weight_pairs(module, engine).tolist()

    # Where weights are the numbers of their channels, pairs tell which channels they take.
    shown = torch.arange(weight.shape[1]).view(-1, *[1] * (weight.dim() - 2)).expand_as(weight).to(torch.int8)
    channels = pairs_of(shown)
    generator = torch.Generator().manual_seed(4)
    answers = []
    for _ in range(20):
        pairs = pairs_of(torch.where(torch.rand(weight.shape, generator=generator) < 0.02, weight, weight // 3))
        test = emulation.overflow_test(module, engine)
        counterparts = [emulated(module, engine, saturating) for saturating in (True, False)]
        for share in (0.1, 0.3, 0.6, 1.0):
            limits = 255 * torch.rand(inputs.shape[1], generator=generator) ** (1 / share - 1)
            values = torch.minimum(inputs.int_repr(), limits.view(-1, *[1] * (inputs.dim() - 2))).to(torch.uint8)
            given = torch._make_per_tensor_quantized_tensor(values, inputs.q_scale(), 20)
            highest = [max(20, int(values[:, channel].max())) for channel in range(values.shape[1])]
            expected = False
            for output, (of_output, taken) in enumerate(zip(pairs, channels, strict=True)):
                first = output // (len(pairs) // groups) * weight.shape[1]
                for pair, of in zip(of_output, taken, strict=True):
                    products = [factor * highest[first + channel] for factor, channel in zip(pair, of, strict=True)]
                    expected |= sum(p for p in products if p > 0) > 32767 or sum(p for p in products if p < 0) < -32768
            assert test(given) == expected
            if not expected:
                assert steps(counterparts[0](given), counterparts[1](given)) == 0
            answers.append(expected)
    # oneDNN's depthwise weights have no neighbours, nor have groups of 3.
    neighbours = bool(emulation.weight_pairs(module, engine)[..., 1].any())
    assert set(answers) == ({True, False} if neighbours else {False})


def test_a_transposed_convolution_counts_as_one_that_may_overflow() -> None:
    with quantize.engine(Engine.qnnpack):  # FBGEMM doesn't give back the weights that it was given
        module = nnq.ConvTranspose2d(8, 8, 2)
        module.set_weight_bias(torch.quantize_per_tensor(torch.full((8, 8, 2, 2), 65.0), 1.0, 0, torch.qint8), None)
    assert emulation.can_overflow(module, ENGINES[0])
    assert not emulation.can_overflow(module, Engine.qnnpack)
    for highest in (252, 253):  # 2 * 65 * 252 = 32760
        values = torch.zeros(1, 8, 4, 4, dtype=torch.uint8)
        values[0, 3, 1, 1] = highest
        given = torch._make_per_tensor_quantized_tensor(values, 1.0, 0)
        assert emulation.overflow_test(module, ENGINES[0])(given) == (highest > 252)
        assert not emulation.overflow_test(module, Engine.qnnpack)(given)
    assert emulation.not_emulated(nn.Sequential(module)) == ("0",)
    with pytest.raises(InputError, match="ConvTranspose2d"):
        emulation.weight_pairs(module, ENGINES[0])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", ["conv", "depthwise", "linear"])
def test_channels_without_weights_keep_their_bias(shape: str, per_channel: bool) -> None:
    """Exact accumulators are qnnpack's, which alone wraps around if a bias is far larger than the weights' products."""
    module, inputs = layer(shape, Engine.qnnpack)
    integers, scales = module.weight().int_repr(), module.weight().q_per_channel_scales().float()
    scales[: 5 if per_channel else len(scales)] = 1e-12
    weight, bias = packed(integers, scales, per_channel, 0), torch.linspace(-60, 60, len(scales))
    geometry = {name: SHAPES[shape][name] for name in ("padding", "groups") if name in SHAPES[shape]}
    function = nn.functional.linear if shape == "linear" else nn.functional.conv2d
    expected = function(inputs.dequantize(), weight.dequantize(), bias, **geometry)
    module.scale, module.zero_point = float(expected.abs().max()) / 127, 128
    with quantize.engine(Engine.qnnpack):
        module.set_weight_bias(weight, bias)
        wrapped = module(inputs).dequantize()
        fit_biases(nn.Sequential(module))
        fitting = module(inputs).dequantize()
    assert float((wrapped - expected).abs().max()) > 10 * module.scale
    assert float((fitting - expected).abs().max()) <= 0.51 * module.scale


# ------------------------------------------------------------------------------------------------ whole models


def converted(flow: FlowName, engine: Engine) -> tuple[nn.Module, nn.Module, Tensor]:
    """A small residual network for this engine and for qnnpack, and images."""
    some = images(4)
    fused = FLOWS[flow].fuse(trained(architectures.tiny(10)), spec(), some)
    prepared = FLOWS[flow].prepare(fused, spec(engine=engine), some)
    quantize.calibrate(prepared, [some])
    return FLOWS[flow].convert(prepared).module, quantize.exact(prepared), some


@pytest.mark.parametrize("clamp", [nn.ReLU, nn.ReLU6, nn.Hardtanh])
@pytest.mark.parametrize("engine", ONE_OF_EACH)
def test_where_nothing_saturates_exact_sums_change_nothing(engine: Engine, clamp: type[nn.Module]) -> None:
    """With 7-bit activations; whatever layers are between those that add up."""
    some = images(4)
    fused = FLOWS[FlowName.fx].fuse(trained(Chain(clamp)), spec(), some)
    prepared = FLOWS[FlowName.fx].prepare(fused, spec(settings(activation_bits=7), engine=engine), some)
    quantize.calibrate(prepared, [some])
    expected, actual = (
        executed(model, engine, some)
        for model in (FLOWS[FlowName.fx].convert(prepared).module, quantize.exact(prepared))
    )
    assert relative_error(actual, expected) < 0.02


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("engine", ONE_OF_EACH)
def test_whole_models_answer_as_executed(engine: Engine, flow: FlowName) -> None:
    model, exact, some = converted(flow, engine)
    before = executed(model, engine, some)
    assert emulation.not_emulated(model) == ()
    assert emulation.at_risk(model, engine, kernels.KINDS)
    assert not emulation.at_risk(exact, Engine.qnnpack, kernels.KINDS)
    saturating = "conv" in probe().saturating_kinds(engine)
    counterpart = emulation.with_emulated_accumulators(model, engine, saturating)
    rows = emulation.layer_by_layer(model, counterpart, [some[:2], some[2:]], engine)
    assert len(rows) == len(list(emulation.int8_layers(model)))
    # See check_against_execution for the step that a machine with VNNI may differ by.
    assert max(row.largest for row in rows) <= (0 if saturating else 1)
    if saturating:
        assert torch.equal(executed(counterpart, engine, some), before)
    assert torch.equal(executed(model, engine, some), before)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("engine", ONE_OF_EACH)
def test_layers_are_compared_each_by_itself(engine: Engine, flow: FlowName) -> None:
    model, exact, some = converted(flow, engine)
    saturated = emulation.with_emulated_accumulators(model, engine)
    rows = {row.name: row for row in emulation.layer_by_layer(saturated, exact, [some], engine)}
    rounding = {
        row.name: row
        for row in emulation.layer_by_layer(
            emulation.with_emulated_accumulators(model, engine, saturating=False), exact, [some], engine
        )
    }
    assert {row.kind for row in rows.values()} == {"conv", "pointwise", "linear"}
    assert all(row.largest <= 1 for row in rounding.values())
    assert max(row.largest for row in rows.values()) > 1
    first = next(iter(rows.values()))
    assert first.outputs == 4 * 8 * 16 * 16
    assert first.share == first.different / first.outputs


def test_qnnpack_has_nothing_to_emulate() -> None:
    with pytest.raises(InputError, match="qnnpack has exact accumulators"):
        emulation.with_emulated_accumulators(nn.Sequential(), Engine.qnnpack)


def test_models_with_other_layers_are_not_compared() -> None:
    _, exact, some = converted(FlowName.eager, ENGINES[0])
    with pytest.raises(InputError, match="has no INT8 layer"):
        emulation.layer_by_layer(nn.Sequential(), exact, [some], ENGINES[0])
