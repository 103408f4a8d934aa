"""Saved models load back to the same logits, take any batch, and refuse to run under another engine."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Activation, Engine, FlowName, QConfig, RuntimeName
from qexp.data.loading import Data, load_data, normalise
from qexp.errors import RunError
from qexp.latency.protocol import threads
from qexp.models import architectures
from qexp.models.inference import BLOCK_BATCHES, blocks, predict
from qexp.quantize import FLOWS
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.records import Precision
from qexp.runtimes import RUNTIMES
from qexp.runtimes.base import Loaded, agree
from tests.helpers import ROOT
from tests.helpers.quantizable import BY_TORCH, Plain, images, settings, spec, trained

EAGER = RUNTIMES[RuntimeName.eager]
TORCHSCRIPT = RUNTIMES[RuntimeName.torchscript]
CHANNELS_LAST = RUNTIMES[RuntimeName.eager_channels_last]
TWO = images(2)
ENGINES = quantize.supported()
QCONFIG = settings(overflow="weights")


def float_net(flow: FlowName) -> nn.Module:
    return trained(Plain()) if flow is FlowName.fx else trained(architectures.tiny())


def int8_of(net: nn.Module, flow: FlowName, engine: Engine, qconfig: QConfig = QCONFIG) -> nn.Module:
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, spec(), TWO), spec(qconfig, engine=engine), TWO)
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, images(16, seed=3).split(8))
    return FLOWS[flow].convert(prepared).module


def blank(net: nn.Module, flow: FlowName, engine: Engine) -> nn.Module:
    return quantize.skeleton(FLOWS[flow].fuse(net, spec(), TWO), FLOWS[flow], spec(QCONFIG, engine=engine), TWO)


def run(net: nn.Module | Loaded, engine: Engine, batch: Tensor) -> Tensor:
    with quantize.engine(engine), torch.inference_mode():
        return net(batch)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flow", BY_TORCH)
def test_int8_logits_are_the_same_after_loading_in_every_flow_engine_and_runtime(
    flow: FlowName, engine: Engine, tmp_path: Path
) -> None:
    net = float_net(flow)
    int8 = int8_of(net, flow, engine)
    with warnings.catch_warnings():
        # Nothing is printed that a reader of a first run can't act on.
        warnings.simplefilter("error")
        saved = EAGER.export(int8, TWO, tmp_path / "model.pt")
        loaded = EAGER.load(saved, lambda: blank(net, flow, engine), engine)
        with quantize.engine(engine):
            scripted = TORCHSCRIPT.load(TORCHSCRIPT.export(int8, TWO, tmp_path / "model.ts"), nn.Identity, engine)
        # In flow=dynamic the convolutions stay in FP32, whose last bits TorchScript may compute otherwise.
        tolerance = EAGER.tolerance(Precision.int8, all_int8=flow is not FlowName.dynamic)
        for count in (1, 8, 32):
            batch = images(count, seed=count)
            expected = run(int8, engine, batch)
            assert expected.shape == (count, 10)
            agree(expected.numpy(), run(loaded, engine, batch).numpy(), Precision.int8, tolerance)
            agree(expected.numpy(), run(scripted, engine, batch).numpy(), Precision.int8, tolerance)
    assert not torch.equal(expected, net(batch))


class Branching(nn.Module):
    """Only a scripted module can have a condition in TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight if values.size(0) > 2 else values


@pytest.mark.parametrize("flow", [*FlowName, "scripted part"])
def test_torchscript_holds_what_a_trace_of_the_model_itself_does(flow: FlowName | str, tmp_path: Path) -> None:
    with quantize.engine(Engine.fbgemm), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if isinstance(flow, FlowName):
            net = int8_of(float_net(flow), flow, Engine.fbgemm)
        else:
            net = (
                nn.Sequential(trained(architectures.tiny()), torch.jit.script(Branching())).eval().requires_grad_(False)
            )
        torch.jit.save(torch.jit.freeze(torch.jit.trace(net, TWO)), tmp_path / "plain.ts")
        plain = torch.jit.load(tmp_path / "plain.ts")
        exported = torch.jit.load(TORCHSCRIPT.export(net, TWO, tmp_path / "model.ts"))
    nodes = [[node.kind() for node in model.graph.nodes()] for model in (plain, exported)]
    assert nodes[0] == nodes[1]
    for batch in (TWO, images(8)):
        assert torch.equal(run(exported, Engine.fbgemm, batch), run(plain, Engine.fbgemm, batch))


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_fp32_runtimes_agree_with_the_float_model(flow: FlowName, tmp_path: Path) -> None:
    net, batch = float_net(flow), images(32, seed=1)
    fused = FLOWS[flow].fuse(net, spec(), TWO)
    saved = EAGER.export(fused, TWO, tmp_path / "model.pt")
    variants = [
        EAGER.load(saved, lambda: FLOWS[flow].fuse(float_net(flow), spec(), TWO), None),
        CHANNELS_LAST.load(saved, lambda: FLOWS[flow].fuse(float_net(flow), spec(), TWO), None),
        TORCHSCRIPT.load(TORCHSCRIPT.export(fused, TWO, tmp_path / "model.ts"), nn.Identity, None),
    ]
    expected = net(batch).numpy()
    for variant in variants:
        assert agree(expected, variant(batch).numpy(), Precision.fp32, tolerance=1e-4) < 1e-5
        assert variant(batch[:1]).shape == (1, 10)
    assert variants[1].module.state_dict().keys() == fused.state_dict().keys()


@pytest.mark.parametrize("flow", BY_TORCH)
def test_steps_share_the_weights_of_the_fused_model_and_leave_them_as_they_are(flow: FlowName, tmp_path: Path) -> None:
    fused = FLOWS[flow].fuse(float_net(flow), spec(), TWO)
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    prepared = FLOWS[flow].prepare(fused, spec(QCONFIG), TWO)
    own = {id(parameter) for parameter in fused.parameters()}
    assert all(id(parameter) in own for parameter in prepared.module.parameters())
    if flow is not FlowName.dynamic:
        quantize.calibrate(prepared, [images(8)])
    FLOWS[flow].convert(prepared)
    # Of flow=dynamic, layers stay in FP32, and are read from the file of a model with other weights.
    other = trained(Plain() if flow is FlowName.fx else architectures.tiny(), seed=9)
    saved = EAGER.export(int8_of(other, flow, Engine.x86), TWO, tmp_path / "model.pt")
    EAGER.load(saved, lambda: quantize.skeleton(fused, FLOWS[flow], spec(QCONFIG), TWO), Engine.x86)
    saved = EAGER.export(FLOWS[flow].fuse(other, spec(), TWO), TWO, tmp_path / "fp32.pt")
    CHANNELS_LAST.load(saved, lambda: quantize.sharing_copy(fused), None)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.stride() == before[name].stride(), name


def test_every_runtime_has_its_object_and_its_own_files_are_told_apart() -> None:
    assert [runtime.name for runtime in RUNTIMES.values()] == list(RUNTIMES) == list(RuntimeName)
    assert len({runtime.file(precision) for precision in Precision for runtime in (EAGER, TORCHSCRIPT)}) == 4


def test_an_int8_model_refuses_another_engine(tmp_path: Path) -> None:
    net = float_net(FlowName.eager)
    int8 = int8_of(net, FlowName.eager, Engine.fbgemm)
    saved = EAGER.export(int8, TWO, tmp_path / "model.pt")
    loaded = EAGER.load(saved, lambda: blank(net, FlowName.eager, Engine.fbgemm), Engine.fbgemm)
    with quantize.engine(Engine.fbgemm):
        scripted = TORCHSCRIPT.load(TORCHSCRIPT.export(int8, TWO, tmp_path / "model.ts"), nn.Identity, Engine.fbgemm)
    for model in (loaded, scripted):
        with quantize.engine(Engine.qnnpack), pytest.raises(RunError, match="converted for engine=fbgemm"):
            model(TWO)


def raised_under(inside: list[str]) -> None:
    inside.append(torch.backends.quantized.engine)
    raise ZeroDivisionError


def test_the_engine_is_put_back_after_an_error() -> None:
    before = torch.backends.quantized.engine
    other = next(engine for engine in ENGINES if engine.value != before)
    inside: list[str] = []
    with pytest.raises(ZeroDivisionError), quantize.engine(other):
        raised_under(inside)
    assert inside == [other.value]
    assert torch.backends.quantized.engine == before


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    saved = EAGER.export(
        int8_of(trained(architectures.tiny(width=16)), FlowName.eager, Engine.x86), TWO, tmp_path / "model.pt"
    )
    skeleton = blank(trained(Plain()), FlowName.fx, Engine.x86)
    with pytest.raises(RunError, match=r"model\.pt doesn't hold the model that these settings make"):
        EAGER.load(saved, lambda: skeleton, Engine.x86)


def test_disagreement_is_refused() -> None:
    logits = np.array([[1.0, -4.0], [2.0, 0.5]], dtype=np.float32)
    fp32, int8 = ((precision, EAGER.tolerance(precision, all_int8=True)) for precision in Precision)
    assert agree(logits, logits, *int8) == 0
    nearly = logits + np.float32(1e-4)
    assert agree(logits, nearly, *fp32) == pytest.approx(2.5e-5, rel=0.01)
    with pytest.raises(RunError, match=r"two runtimes of the same INT8 model differ by 2\.5e-05"):
        agree(logits, nearly, *int8)
    with pytest.raises(RunError, match="two runtimes of the same FP32 model"):
        agree(logits, logits * np.float32(1.001), *fp32)
    with pytest.raises(RunError, match="nan"):
        agree(logits, logits * np.float32("nan"), *fp32)


def test_a_fresh_process_gives_the_same_int8_logits(tmp_path: Path) -> None:
    int8 = int8_of(float_net(FlowName.eager), FlowName.eager, Engine.x86)
    EAGER.export(int8, TWO, tmp_path / "model.pt")
    with quantize.engine(Engine.x86):
        TORCHSCRIPT.export(int8, TWO, tmp_path / "model.ts")
    expected = run(int8, Engine.x86, TWO)
    torch.save((TWO, expected), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.helpers.quantizable import settings, spec, trained
from qexp import quantize
from qexp.models import architectures
from qexp.config.schema import Engine, FlowName
from qexp.runtimes import RUNTIMES
from torch import nn
folder = Path(sys.argv[1])
images, expected = torch.load(folder / "expected.pt")
flow, guarded = quantize.FLOWS[FlowName.eager], spec(settings(overflow="weights"))
fused = flow.fuse(architectures.tiny(), guarded, images)
skeleton = quantize.skeleton(fused, flow, guarded, images)
with quantize.engine(Engine.x86):
    assert torch.equal(RUNTIMES["eager"].load(folder / "model.pt", lambda: skeleton, Engine.x86)(images), expected)
    assert torch.equal(RUNTIMES["torchscript"].load(folder / "model.ts", nn.Identity, Engine.x86)(images), expected)
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, str(tmp_path), str(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_narrow_grids_run_on_the_same_kernels_and_cost_accuracy(bits: int) -> None:
    net, batch = float_net(FlowName.eager), images(32, seed=5)
    errors = []
    for width in (bits, 8):
        qconfig = settings(weight_bits=width, activation_bits=width)
        assert qconfig.activation == Activation(qconfig.activation.scheme, width)
        int8 = int8_of(net, FlowName.eager, Engine.qnnpack, qconfig)
        errors.append(float((run(int8, Engine.qnnpack, batch) - net(batch)).square().mean()))
    assert errors[0] > errors[1]


# ------------------------------------------------------------------------------------------------ evaluate


def digits(folder: Path) -> Data:
    spec = yaml.safe_load((ROOT / "conf" / "dataset" / "digits.yaml").read_text())
    return load_data(spec, folder)


def test_predictions_are_those_of_one_batch_size_in_the_order_asked(tmp_path: Path) -> None:
    data = digits(tmp_path)
    seen: list[int] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return torch.stack([batch.mean((1, 2, 3)), batch.amax((1, 2, 3))], 1)

    indices = np.array([5, 3, 700, 3, 11])
    predictions = predict(model, data.test, data.mean, data.std, 4, indices=indices)
    assert seen == [4, 4]
    assert predictions.logits.dtype == np.float32
    expected = model(normalise(data.test.pixels(indices), data.mean, data.std)).numpy()
    assert np.array_equal(predictions.logits, expected)
    assert np.array_equal(predictions.labels, data.test.labels[indices])
    assert predictions.image_ids == tuple(data.test.ids[i] for i in indices)
    everything = predict(model, data.test, data.mean, data.std, 256)
    assert everything.logits.shape == (len(data.test), 2)
    assert np.array_equal(everything.logits[indices], expected)


def test_blocks_are_a_fixed_random_sample_and_give_the_logits_that_the_order_of_the_data_set_gives(
    tmp_path: Path,
) -> None:
    data = digits(tmp_path)
    seen: list[int] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return torch.stack([batch.mean((1, 2, 3)), batch.amax((1, 2, 3))], 1)

    arguments = (model, data.test, data.mean, data.std, 8)
    in_order = predict(*arguments)
    shuffled = predict(*arguments, shuffled=True, copies=[model])
    assert np.array_equal(shuffled.logits, in_order.logits)
    assert shuffled.image_ids == in_order.image_ids

    def logits_of(_: object, positions: np.ndarray) -> np.ndarray:
        return model(normalise(data.test.pixels(positions), data.mean, data.std)).numpy()

    first, second = (list(blocks(logits_of, [model], len(data.test), 8, "", shuffled=True)) for _ in range(2))
    assert [len(positions) for positions, _ in first[:-1]] == [BLOCK_BATCHES * 8] * (len(first) - 1)
    every = np.concatenate([positions for positions, _ in first])
    assert np.array_equal(every, np.concatenate([positions for positions, _ in second]))
    assert np.array_equal(np.sort(every), np.arange(len(data.test)))
    for positions, logits in first:
        assert np.array_equal(logits, in_order.logits[positions])
    # The digits come in no order of classes; positions tell whether a block is a sample of them all.
    assert abs(first[0][0].mean() - len(data.test) / 2) < 0.1 * len(data.test)


def test_after_a_block_an_evaluation_can_be_stopped() -> None:
    seen: list[int] = []

    def logits_of(_: object, positions: np.ndarray) -> np.ndarray:
        seen.append(len(positions))
        return np.zeros((len(positions), 3), np.float32)

    for _positions, logits in blocks(logits_of, [torch.relu], 899, 4, ""):
        assert len(logits) == 4 * BLOCK_BATCHES
        break
    assert len(seen) == BLOCK_BATCHES


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])  # torch 2.13's, and 2.14's
def test_what_torch_says_of_its_own_end_is_silenced_and_nothing_else(category: type[Warning]) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with known_deprecations_silenced():
            warnings.warn("`torch.jit.trace` is deprecated. Please switch to `torch.export`.", category, stacklevel=1)
            warnings.warn("torch.ao.quantization is deprecated and will be removed in 2.10.", category, stacklevel=1)
            warnings.warn("`torch.elsewhere` is deprecated.", category, stacklevel=1)
    assert [str(one.message) for one in heard] == ["`torch.elsewhere` is deprecated."]


class Forgetful(nn.Module):
    """A model that keeps something in itself while it runs, as many do."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.batch = net, torch.zeros(0)

    def forward(self, batch: Tensor) -> Tensor:
        self.batch = batch
        time.sleep(0.002)
        return self.net(self.batch)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_batches_side_by_side_give_the_same_logits_in_the_same_order(
    flow: FlowName, engine: Engine, tmp_path: Path
) -> None:
    data = digits(tmp_path)
    int8 = int8_of(float_net(flow), flow, engine)
    with quantize.engine(engine):
        traced = TORCHSCRIPT.load(TORCHSCRIPT.export(int8, TWO, tmp_path / "model.ts"), nn.Identity, engine)
        for model in (Loaded(Forgetful(int8), engine), traced):
            one = predict(model, data.test, data.mean, data.std, 32)
            several = predict(model, data.test, data.mean, data.std, 32, copies=model.copies(2))
            assert np.array_equal(one.logits, several.logits)
            assert one.image_ids == several.image_ids
    # What they share costs no memory.
    net = float_net(flow)
    (copied,) = Loaded(net, None).copies(1)
    assert copied.module is not net
    assert all(a is b for a, b in zip(net.parameters(), copied.module.parameters(), strict=True))


@pytest.mark.slow
def test_dynamic_layers_of_onednn_answer_batches_side_by_side_with_ranges_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Enough work before the layer that two threads reach it at all sorts of moments.
    convolutions = (nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*convolutions, nn.Linear(64, 10)).requires_grad_(False)
    batches = [torch.randn(32, 3, 32, 32) * (1 + scale) + scale for scale in range(8)]
    with quantize.engine(Engine.onednn), threads(1), torch.inference_mode():
        int8 = int8_of(net, FlowName.dynamic, Engine.onednn)
        model = TORCHSCRIPT.load(
            TORCHSCRIPT.export(int8, batches[0], tmp_path / "model.ts"), nn.Identity, Engine.onednn
        )
        expected = [model(batch) for batch in batches]
        (copy,) = model.copies(1)

        def wrong(one: Loaded, order: list[int]) -> list[int]:
            return [index for index in order if not torch.equal(one(batches[index]), expected[index])]

        orders = [0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]
        for _ in range(30):
            with ThreadPoolExecutor(2, initializer=lambda: torch.set_num_threads(1)) as pool:
                assert list(pool.map(wrong, (model, copy), orders)) == [[], []]


def test_a_batch_that_fails_ends_the_others_and_gives_the_threads_back(tmp_path: Path) -> None:
    data = digits(tmp_path)
    calls: list[int] = []

    def failing(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        time.sleep(0.05)  # or all are through before anybody hears of the first
        raise RuntimeError("no")

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no"):
        predict(failing, data.test, data.mean, data.std, 4, copies=[failing])
    assert torch.get_num_threads() == before
    assert len(calls) < 20  # of 225
