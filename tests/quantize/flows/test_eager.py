"""flow=eager and flow=dynamic: what is fused, what is refused and with which words, what the layers are."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules

from qexp import quantize
from qexp.config.schema import ActivationObserver, Engine, FlowName, Observer, QConfig
from qexp.errors import InputError, NotFinite, RunError
from qexp.models import architectures
from qexp.quantize import FLOWS, Prepared
from qexp.quantize.inspection import fusion_check
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.system.torchvision_import import torchvision
from tests.helpers.quantizable import BY_TORCH, MINMAX, Chain, Plain, images, relative_error, settings, spec, trained

TWO = images(2)


def prepared_and_converted(
    net: nn.Module, qconfig: QConfig, fusion: bool = True, engine: Engine = Engine.x86
) -> tuple[Prepared, nn.Module]:
    fused = FLOWS[FlowName.eager].fuse(net, spec(fusion=fusion), TWO)
    prepared = FLOWS[FlowName.eager].prepare(fused, spec(qconfig, engine=engine), TWO)
    assert quantize.calibrate(prepared, images(16, seed=3).split(8)) == 16
    return prepared, FLOWS[FlowName.eager].convert(prepared).module


def kinds(converted: nn.Module, flow: FlowName = FlowName.eager) -> list[tuple[str, bool]]:
    return [(layer.kind, layer.int8) for layer in torch_layers.layers(converted, FLOWS[flow], Engine.x86)]


def error(converted: nn.Module, net: nn.Module, engine: Engine = Engine.x86) -> float:
    batch = images(8, seed=4)
    with quantize.engine(engine), torch.inference_mode():
        return relative_error(converted(batch), net(batch))


def test_chains_are_found_by_tracing_where_a_model_has_no_fuse_model() -> None:
    net = trained(Chain())
    fused = FLOWS[FlowName.eager].fuse(net, spec(), TWO)
    assert fusion_check.fusion_difference(net, fused, images(8)) < 1e-5
    assert [type(m).__name__ for m in fused.features] == [
        *("ConvReLU2d", "Identity", "Identity") * 2,
        *("ConvReLU2d", "Identity"),
    ]
    _, converted = prepared_and_converted(net, settings(overflow="activations"))
    assert kinds(converted) == [("conv", True), ("depthwise", True), ("pointwise", True), ("linear", True)]
    assert error(converted, net) < 0.1


def test_the_float_model_is_left_as_it_was() -> None:
    net = trained(architectures.tiny())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    answer = net(TWO)
    prepared_and_converted(net, settings())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(TWO), answer)
    assert not any(hasattr(m, "qconfig") for m in net.modules())


def test_a_model_with_stubs_gets_no_second_pair() -> None:
    _, converted = prepared_and_converted(trained(architectures.tiny()), settings())
    assert sum(type(m).__name__ == "Quantize" for m in converted.modules()) == 1
    assert next(layer.name for layer in torch_layers.layers(converted, FLOWS[FlowName.eager], Engine.x86)) == "conv1"


def test_a_model_without_stubs_is_wrapped_and_keeps_its_names() -> None:
    _, converted = prepared_and_converted(trained(Chain()), settings())
    assert sum(type(m).__name__ == "Quantize" for m in converted.modules()) == 1
    assert [layer.name for layer in torch_layers.layers(converted, FLOWS[FlowName.eager], Engine.x86)] == [
        "features.0",
        "features.3",
        "features.6",
        "fc",
    ]


def test_without_fusion_batchnorm_is_quantized_by_itself() -> None:
    net = trained(Chain())
    prepared, converted = prepared_and_converted(net, settings(overflow="activations"), fusion=False)
    assert kinds(converted).count(("batchnorm", True)) == 2
    assert error(converted, net) < 0.2
    # What feeds only a ReLU has no range below zero, though the two are not fused.
    assert torch_layers.read_qparams(prepared.module)["features.1"].zero_point.tolist() == [0]
    prepared, _ = prepared_and_converted(net, settings(range_after_clamp=False), fusion=False)
    assert torch_layers.read_qparams(prepared.module)["features.1"].zero_point.tolist() != [0]


def test_padding_named_same_is_taken() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 5, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 10)))
    _, converted = prepared_and_converted(net, settings(overflow="activations"))
    assert kinds(converted) == [("conv", True), ("linear", True)]
    assert error(converted, net) < 0.1


def test_relu6_after_a_convolution_ends_the_range() -> None:
    net = trained(Chain(nn.ReLU6))
    net.features[0].weight.data.mul_(20)
    prepared, _ = prepared_and_converted(net, settings())
    qparams = torch_layers.read_qparams(prepared.module)["features.0"]
    assert qparams.zero_point.tolist() == [0]
    assert qparams.scale[0] * 255 == pytest.approx(6)
    prepared, _ = prepared_and_converted(net, settings(range_after_clamp=False))
    assert torch_layers.read_qparams(prepared.module)["features.0"].scale[0] * 255 > 12


class ReusedReLU(nn.Module):
    """The classic trap: one ReLU for two places, and a fuse_model that fuses the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Module()
        self.block = ReusedBlock()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.fc(self.block(self.stem(self.quant(x))).mean((2, 3))))

    def fuse_model(self) -> None:
        fuse_modules(self.block, ["conv", "bn", "relu"], inplace=True)


class ReusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.add.add(self.relu(self.bn(self.conv(x))), x))


def test_a_relu_that_fusion_lost_is_found_and_its_block_named() -> None:
    net = trained(ReusedReLU())
    batch = images(8)
    fused = FLOWS[FlowName.eager].fuse(net, spec(), TWO)
    assert fusion_check.fusion_difference(net, fused, batch) > 1e-4
    assert fusion_check.blame(net, fused, batch) == "block"
    whole = FLOWS[FlowName.fx].fuse(net, spec(), TWO)
    assert fusion_check.fusion_difference(net, whole, batch) < 1e-5


def test_a_bare_addition_is_refused_with_its_module_and_the_flow_that_works() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 3, padding=1)
            self.block = Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    with pytest.raises(InputError) as refusal:
        quantize.dry_run(trained(Adds()), FLOWS[FlowName.eager], spec(), TWO)
    sentence = str(refusal.value)
    assert "module block (Residual)" in sentence
    assert "aten::add" in sentence
    assert sentence.endswith("this model works with flow=fx.")
    assert "\n" not in sentence


def test_a_batchnorm_that_eager_cannot_fold_is_refused_and_fx_named() -> None:
    class OwnConv(nn.Conv2d):
        pass

    net = trained(nn.Sequential(OwnConv(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)))
    with pytest.raises(InputError, match=r"can't fold the BatchNorm 1 .*flow=fx"):
        quantize.dry_run(net, FLOWS[FlowName.eager], spec(), TWO)


def test_a_model_that_every_flow_refuses_is_told_so() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Softmax(1))
    with pytest.raises(InputError, match="no flow takes this model"):
        quantize.dry_run(net, FLOWS[FlowName.dynamic], spec(), TWO)


def test_what_is_wrong_with_weights_or_images_is_not_laid_on_the_flow() -> None:
    net = trained(architectures.tiny())
    with torch.no_grad():
        next(net.parameters())[0] = math.nan
    broken = "conv1.weight of the float model holds NaN or infinity; check model.checkpoint."
    for given, reason in ((TWO, broken), (TWO * math.inf, "check dataset.std.")):
        with pytest.raises(InputError, match=rf"{reason}$"):
            quantize.dry_run(net, FLOWS[FlowName.eager], spec(), given)


def test_dry_run_takes_what_the_flow_takes() -> None:
    for flow in FlowName:
        quantize.dry_run(trained(architectures.tiny()), FLOWS[flow], spec(), TWO)


@pytest.mark.parametrize("flow", BY_TORCH)
def test_skeleton_takes_the_saved_state_and_says_nothing(flow: FlowName, tmp_path: object) -> None:
    net = trained(architectures.tiny())
    qconfig = settings(overflow="activations")
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), TWO), spec(qconfig), TWO)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, [images(8)])
    converted = FLOWS[flow].convert(prepared).module
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = FLOWS[flow].fuse(trained(architectures.tiny(), seed=9), spec(), TWO)
        skeleton = quantize.skeleton(other, FLOWS[flow], spec(qconfig), TWO)
    skeleton.load_state_dict(converted.state_dict(), assign=True)
    with quantize.engine(Engine.x86), torch.inference_mode():
        assert torch.equal(skeleton(TWO), converted(TWO))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("fusion", [True, False])
def test_qparams_of_the_observers_are_those_of_the_converted_model(granularity: str, fusion: bool) -> None:
    prepared, converted = prepared_and_converted(trained(architectures.tiny()), settings(granularity), fusion)
    expected, actual = torch_layers.read_qparams(prepared.module), torch_layers.read_qparams(converted)
    assert set(expected) == set(actual)
    assert {"quant", "conv1", "conv1.weight", "fc", "fc.weight", "blocks.0.add_relu"} <= set(actual)
    for name, qparams in expected.items():
        assert np.array_equal(qparams.scale, actual[name].scale), name
        assert np.array_equal(qparams.zero_point, actual[name].zero_point), name
        assert qparams.axis == actual[name].axis
    assert (expected["conv1.weight"].axis == 0) == (granularity == "per_channel")


@pytest.mark.parametrize(("bits", "highest"), [(8, 255), (7, 127), (4, 15)])
def test_qparams_of_a_prepared_model_hold_the_codes_that_are_executed(bits: int, highest: int) -> None:
    # A guard reduces the range of activations in their scale only.
    qconfig = settings(weight_bits=4, activation_bits=bits, overflow="activations")
    prepared, _ = prepared_and_converted(trained(architectures.tiny()), qconfig)
    qparams = torch_layers.read_qparams(prepared.module)
    assert (qparams["conv1.weight"].qmin, qparams["conv1.weight"].qmax) == (-8, 7)
    assert (qparams["conv1"].qmin, qparams["conv1"].qmax) == (0, highest)


def test_dynamic_flow_quantizes_linear_layers_and_says_what_it_left() -> None:
    net = trained(Chain())
    prepared = FLOWS[FlowName.dynamic].prepare(FLOWS[FlowName.dynamic].fuse(net, spec(), TWO), spec(), TWO)
    converted = FLOWS[FlowName.dynamic].convert(prepared).module
    layers = torch_layers.layers(converted, FLOWS[FlowName.dynamic], Engine.x86)
    assert [layer.name for layer in layers if layer.int8] == ["fc"]
    assert {layer.reason for layer in layers if not layer.int8} == {"flow=dynamic quantizes linear layers only"}
    assert 0 < error(converted, net) < 0.05


@pytest.mark.parametrize("field", [{"granularity": "per_tensor"}, {"weight_scheme": "asymmetric"}, {"weight_bits": 4}])
def test_settings_of_weights_change_a_dynamic_model(field: dict) -> None:
    net = trained(Chain())

    def logits(qconfig: QConfig) -> Tensor:
        prepared = FLOWS[FlowName.dynamic].prepare(net, spec(qconfig), TWO)
        with quantize.engine(Engine.x86), torch.inference_mode():
            return FLOWS[FlowName.dynamic].convert(prepared).module(images(8))

    assert not torch.equal(logits(settings()), logits(settings(**field)))
    assert torch.equal(logits(settings()), logits(settings(overflow="weights")))


# ------------------------------------------------------------------------------------------------ calibration


def prepared_plain(net: nn.Module) -> Prepared:
    return FLOWS[FlowName.fx].prepare(FLOWS[FlowName.fx].fuse(net, spec(), TWO), spec(), TWO)


def test_a_weight_that_is_not_a_number_is_refused_with_the_layer() -> None:
    net = trained(Chain())
    net.features[3].weight.data[2] = float("nan")
    prepared = FLOWS[FlowName.eager].prepare(net, spec(), TWO)
    with pytest.raises(RunError, match=r"output of features\.3 holds NaN"):
        quantize.calibrate(prepared, [images(8)])


class Reciprocal(Chain):
    """Infinite for a black image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum((1, 2, 3)).reciprocal()[:, None]


@pytest.mark.parametrize("observer", [MINMAX, Observer(ActivationObserver.histogram)])
def test_the_image_that_makes_an_infinity_is_named_where_others_do_not(observer: Observer) -> None:
    fused = FLOWS[FlowName.fx].fuse(trained(Reciprocal()), spec(), TWO)

    def refusal(zeros: list[int], batches: list[int]) -> str:
        given = images(12)
        given[zeros] = 0
        prepared = FLOWS[FlowName.fx].prepare(fused, spec(observer=observer), TWO)
        with pytest.raises(NotFinite) as caught:
            quantize.calibrate(prepared, given.split(batches), "image {}".format)
        return str(caught.value).removeprefix("calibration: the output of getitem holds NaN or infinity")

    one = " for image 6, and not for others, so it has no range: mend the model (does it divide by zero there, or "
    assert refusal([6], [4, 4, 4]).startswith(one)
    assert refusal([5, 6, 7, 8], [4, 4, 4]).startswith(" for image 5 and 2 more of the first 8 images, and not for ")
    assert refusal([4], [4, 1, 7]).startswith(" for image 4, and not for others")  # alone in its batch
    assert refusal([0, 1, 2, 3, 5], [4, 8]).startswith(" for image 0 and 4 more of the first 12 images, and not")
    every = ", so it has no range: the float model itself is broken there; check model.checkpoint"
    assert refusal(list(range(12)), [4, 8]) == every


def test_an_image_behind_what_is_kept_of_calibration_goes_by_its_position_among_all(tmp_path: Path) -> None:
    fused = FLOWS[FlowName.fx].fuse(trained(Reciprocal()), spec(), TWO)
    given = images(12).numpy()
    given[8] = 0
    parts = np.split(given, 3)

    def calibrate(count: int) -> None:
        prepared = FLOWS[FlowName.fx].prepare(fused, spec(), TWO)
        named = "image {}".format
        quantize.calibrate_once(prepared, parts[:count], torch.from_numpy, tmp_path, "these", named)

    calibrate(2)
    with pytest.raises(NotFinite, match="for image 8, and not for others"):
        calibrate(3)


def test_an_image_that_is_not_finite_is_refused_as_such() -> None:
    batch = images(8)
    batch[3, 0, 0, 0] = float("inf")
    with pytest.raises(RunError, match="calibration image holds NaN or infinity"):
        quantize.calibrate(prepared_plain(trained(Plain())), [batch])


def test_observers_that_saw_nothing_are_named() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.large if x.shape[-1] > 16 else self.small)(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Choosy()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net = trained(Outer())
    prepared = FLOWS[FlowName.eager].prepare(net, spec(), images(1, size=32))
    with pytest.raises(RunError, match=r"1 observers, the first of them inner\.large"):
        quantize.calibrate(prepared, [images(4, size=16)])


def test_calibration_that_moves_batchnorm_statistics_is_refused() -> None:
    net = trained(Chain())
    prepared = FLOWS[FlowName.eager].prepare(net, spec(), TWO)
    prepared.module.get_submodule("module.features.1").train()
    with pytest.raises(RunError, match=r"BatchNorm module\.features\.1\.running_mean"):
        quantize.calibrate(prepared, [images(8)])


def test_calibration_without_images_is_refused() -> None:
    with pytest.raises(RunError, match="no calibration images"):
        quantize.calibrate(prepared_plain(trained(Plain())), [])


def test_a_model_that_eager_cannot_trace_still_runs_without_clamped_ranges(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > -1e9 else -x)

    with caplog.at_level(logging.INFO, logger="qexp"):
        _, converted = prepared_and_converted(trained(Branching()), settings(), fusion=False)
    assert "qconfig.range_after_clamp has no effect" in caplog.text
    assert all(int8 for _, int8 in kinds(converted))
    with pytest.raises(InputError, match="no fuse_model"):
        FLOWS[FlowName.eager].fuse(trained(Branching()), spec(), TWO)


# ------------------------------------------------------------------------------- which engine takes what (DESIGN)

LEGAL = [
    (engine, granularity, weight_scheme, activation_scheme)
    for engine in quantize.supported()
    for granularity in ("per_tensor", "per_channel")
    for weight_scheme in ("symmetric", "asymmetric")
    for activation_scheme in ("symmetric", "asymmetric")
    if not (engine is Engine.onednn and weight_scheme == "asymmetric")
]


@pytest.mark.parametrize(("engine", "granularity", "weight_scheme", "activation_scheme"), LEGAL)
def test_what_is_legal_runs_and_is_close(
    engine: Engine, granularity: str, weight_scheme: str, activation_scheme: str
) -> None:
    net = trained(Chain())
    qconfig = settings(granularity, weight_scheme, activation_scheme, overflow="weights")
    _, converted = prepared_and_converted(net, qconfig, engine=engine)
    assert all(layer.int8 for layer in torch_layers.layers(converted, FLOWS[FlowName.eager], engine))
    assert error(converted, net, engine) < 0.15


def test_onednn_has_no_asymmetric_weights() -> None:
    with pytest.raises(RuntimeError, match="zero point"):
        prepared_and_converted(trained(Chain()), settings(weight_scheme="asymmetric"), engine=Engine.onednn)


@pytest.mark.parametrize("engine", list(quantize.supported()))
def test_signed_activations_fail_in_convolutions_of_every_engine(engine: Engine) -> None:
    # Why there is no setting for the type of activations.
    with quantize.engine(engine):
        images = torch.quantize_per_tensor(torch.ones(1, 3, 8, 8), 0.1, 0, torch.qint8)
        weight = torch.quantize_per_tensor(torch.ones(8, 3, 3, 3), 0.1, 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 1)
        with pytest.raises(RuntimeError):
            torch.ops.quantized.conv2d(images, packed, 0.1, 0)


def test_an_engine_that_torch_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexp.quantize.torch_backend.engines.supported", lambda: (Engine.fbgemm,))
    refused = pytest.raises(InputError, match=r"engine=qnnpack is not in this build of torch: choose one of fbgemm")
    with refused, quantize.engine(Engine.qnnpack):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("mobilenet_v2", 53), ("mobilenet_v3_large", 64), ("shufflenet_v2_x1_0", 57), ("resnet50", 54)]
)
def test_quantizable_models_of_torchvision_run_wholly_in_int8(name: str, count: int) -> None:
    net = trained(getattr(torchvision.models.quantization, name)(weights=None, quantize=False))
    example = images(2, size=64)
    fused = FLOWS[FlowName.eager].fuse(net, spec(), example)
    assert fusion_check.fusion_difference(net, fused, example) < 1e-4
    prepared = FLOWS[FlowName.eager].prepare(fused, spec(settings(overflow="activations")), example)
    quantize.calibrate(prepared, [example])
    layers = kinds(FLOWS[FlowName.eager].convert(prepared).module)
    assert len(layers) == count
    assert all(int8 for _, int8 in layers)


@pytest.mark.slow
def test_auxiliary_heads_that_never_run_are_left_out_and_named() -> None:
    net = trained(torchvision.models.quantization.googlenet(weights=None, init_weights=False, quantize=False))
    example = images(2, size=64)
    prepared = FLOWS[FlowName.eager].prepare(FLOWS[FlowName.eager].fuse(net, spec(), example), spec(), example)
    quantize.calibrate(prepared, [example])
    layers = torch_layers.layers(FLOWS[FlowName.eager].convert(prepared).module, FLOWS[FlowName.eager], Engine.x86)
    left = [layer for layer in layers if not layer.int8]
    assert {layer.name.partition(".")[0] for layer in left} == {"aux1", "aux2"}
    assert {layer.reason for layer in left} == {"never runs in evaluation"}
