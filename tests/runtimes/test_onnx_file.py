"""Models in ONNX Runtime and OpenVINO: the file is valid and INT8, and what they answer differs by rounding only.

Without VNNI their kernels add up in 16 bits, so that weights have 7 bits wherever logits are compared.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, FlowName, RuntimeName
from qexp.errors import RunError
from qexp.latency.protocol import threads
from qexp.models import architectures
from qexp.quantize import FLOWS, QuantizedModel, qdq
from qexp.records import Precision
from qexp.runtimes import RUNTIMES, onnx_file
from qexp.runtimes.onnx_file import OnnxRuntime
from qexp.runtimes.parting import MOST, first_parted, times_rounding
from qexp.system.torchvision_import import torchvision
from tests.helpers import ROOT, networks
from tests.helpers.quantizable import Plain, images, settings, spec, trained

GUARDED = settings(overflow="weights")
THEIRS = [RuntimeName.onnxruntime, RuntimeName.openvino]
BATCHES = [1, 33]


def int8_of(net: nn.Module, flow: FlowName, batch: Tensor, qconfig: quantize.QuantizationSpec) -> QuantizedModel:
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, qconfig, batch[:2]), qconfig, batch[:2])
    quantize.calibrate(prepared, batch.split(8))
    return FLOWS[flow].convert(prepared)


BUILT: dict[str, Callable[[], nn.Module]] = {
    "tiny": architectures.tiny,
    "plain": Plain,
    "resnet18": partial(architectures.resnet18, num_classes=10),
    "resnet20": partial(architectures.resnet20, num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.quantization.mobilenet_v2(quantize=False, num_classes=10),
}
SIZES = dict.fromkeys(BUILT, 32) | {"tiny": 16, "plain": 16}


@cache
def made(name: str, flow: FlowName, **how: object) -> QuantizedModel:
    if name in networks.NETWORKS:
        net, batch = networks.built(name), networks.images(16, seed=1)
    else:
        torch.manual_seed(0)
        net = trained(BUILT[name]())
        batch = images(16, seed=3, size=SIZES[name])
    return int8_of(net, flow, batch, spec(settings(**{"overflow": "weights", **how})))  # type: ignore[arg-type]


def like(int8: QuantizedModel, count: int) -> Tensor:
    small = sum(1 for _ in int8.fused.modules()) < 50
    return images(count, seed=count, size=16 if small else 32)


def written(int8: QuantizedModel, folder: Path, precision: Precision = Precision.int8) -> Path:
    model = int8.module if precision is Precision.int8 else int8.fused
    with quantize.engine(int8.engine):
        return onnx_file.write(model, like(int8, 2), folder / f"{precision}.onnx")


def torch_logits(int8: QuantizedModel, batch: Tensor) -> tuple[np.ndarray, np.ndarray]:
    with quantize.engine(int8.engine), torch.inference_mode():
        return int8.fused(batch).numpy(), int8.module(batch).numpy()


def answers(name: RuntimeName, path: Path, batch: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return RUNTIMES[name].load(path, nn.Identity, None)(batch).numpy()


# ------------------------------------------------------------------------------------------------ the file

CASES = [("tiny", FlowName.eager), ("plain", FlowName.fx)]


@pytest.mark.parametrize(("name", "flow"), CASES)
def test_the_file_is_valid_and_its_weights_are_int8(name: str, flow: FlowName, tmp_path: Path) -> None:
    int8 = made(name, flow)
    path = written(int8, tmp_path)
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", onnx_file.OPSET)]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == onnx_file.BATCH
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == onnx_file.BATCH
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    assert not kinds.keys() & {"Shape", "Gather", "Pad", "Cast", "Constant", "Relu"}
    weights = [one for one in proto.graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1]
    assert len(weights) == sum(layer.int8 for layer in int8.layers) == kinds["Conv"] + kinds["Gemm"]
    assert not [one for one in proto.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1]


def test_nodes_are_named_after_layers_and_hold_the_runs_own_scales(tmp_path: Path) -> None:
    int8 = made("tiny", FlowName.eager)
    graph = onnx.load(str(written(int8, tmp_path))).graph
    names = {node.name: node for node in graph.node}
    for layer in (layer.name for layer in int8.layers):
        assert names[layer].op_type in ("Conv", "Gemm")
        values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        scale, zero_point = (values[name] for name in names[f"{layer}.quantize"].input[1:3])
        assert scale == pytest.approx(int8.qparams[layer].scale[0])
        assert zero_point == int8.qparams[layer].zero_point[0]


class Twice(nn.Module):
    """Calls one layer twice, and functions in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x)).mean((2, 3)).unsqueeze(1).flatten(1))


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_no_two_nodes_have_one_name(flow: FlowName, tmp_path: Path) -> None:
    int8 = int8_of(trained(Twice()), flow, images(16), spec(GUARDED))
    path = written(int8, tmp_path)
    names = [node.name for node in onnx.load(str(path)).graph.node]
    assert len(set(names)) == len(names)
    assert "" not in names
    assert answers(RuntimeName.onnxruntime, path, images(2)).shape == (2, 10)


@pytest.mark.parametrize("runtime", THEIRS)
def test_a_file_that_a_runtime_does_not_take_is_refused_in_a_sentence(runtime: RuntimeName, tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(b"none")
    with pytest.raises(RunError, match=rf"{runtime} can't \w+ int8\.onnx: .*: take {runtime} out of runtimes"):
        answers(runtime, tmp_path / "int8.onnx", images(1))


def test_the_same_model_makes_the_same_file(tmp_path: Path) -> None:
    int8 = made("plain", FlowName.fx)
    first = written(int8, tmp_path).read_bytes()
    assert written(int8, tmp_path).read_bytes() == first


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_all_layers_run_in_int8(scheme: str, tmp_path: Path) -> None:
    for bits in (8, 4):
        int8 = made("tiny", FlowName.eager, activation_scheme=scheme, activation_bits=bits)
        path = written(int8, tmp_path)
        for name in THEIRS:
            runtime = RUNTIMES[name]
            assert isinstance(runtime, OnnxRuntime)
            kinds = runtime.layers(path, like(int8, 1).numpy().shape)
            assert kinds == (len(int8.layers), 0), (name, bits)


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("runtime", THEIRS)
@pytest.mark.parametrize(("name", "flow"), CASES)
def test_it_answers_as_torch_but_for_rounding(name: str, flow: FlowName, runtime: RuntimeName, tmp_path: Path) -> None:
    check(made(name, flow), runtime, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", THEIRS)
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet_v2"])
def test_larger_networks_do_so_too(name: str, flow: FlowName, runtime: RuntimeName, tmp_path: Path) -> None:
    check(made(name, flow), runtime, tmp_path)


def check(int8: QuantizedModel, runtime: RuntimeName, folder: Path) -> None:
    fp32_file, int8_file = written(int8, folder, Precision.fp32), written(int8, folder)
    for count in BATCHES:
        batch = like(int8, count)
        fp32, expected = torch_logits(int8, batch)
        tolerance = RUNTIMES[runtime].tolerance(Precision.fp32, True) * np.abs(fp32).max()
        np.testing.assert_allclose(answers(runtime, fp32_file, batch), fp32, rtol=0, atol=tolerance)
        assert times_rounding(fp32, expected, answers(runtime, int8_file, batch)) < MOST


# Parts of these that have no counterpart in ONNX, as the sentence says them.
WITHOUT = {
    "ConditionalConv": "module conv2d .* has groups for each image",
    "OddPoolings": r"adaptive_max_pool2d\.default, which has no counterpart in ONNX",
    "Paddings": "module pad .* writes to a tensor in place",
    "PairwiseHead": r"_trilinear\.default, which has no counterpart in ONNX",
    "Prototypes": r"cdist_forward\.default, which has no counterpart in ONNX",
    "RowMemory": "module gru .* writes to a tensor in place",
}
REFUSED = {"FourierMixer": "openvino"}
FX = [name for name, network in networks.NETWORKS.items() if not network.refused(FlowName.fx, Engine.x86)]


def known(int8: QuantizedModel, example: Tensor) -> bool:
    """True if the runtimes are known to take the model's operators; False if it has no program."""
    with quantize.engine(int8.engine):
        try:
            graph = qdq.program(int8.module, example).graph
        except qdq.UnsupportedError:
            return False
    return all(RUNTIMES[name].takes(graph) for name in THEIRS)


@pytest.mark.parametrize(("name", "flow"), [("tiny", FlowName.eager), ("resnet20", FlowName.fx)])
def test_usual_networks_need_no_trial(name: str, flow: FlowName) -> None:
    assert known(made(name, flow), like(made(name, flow), 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", FX)
def test_networks_that_nobody_wrote_for_quantization_run_in_both(name: str, tmp_path: Path) -> None:
    int8 = made(name, FlowName.fx)
    example = networks.images(2)
    if name in WITHOUT | REFUSED:
        assert not known(int8, example), "refused when a run would have begun"
    if name in WITHOUT:
        with quantize.engine(int8.engine), pytest.raises(RunError, match=WITHOUT[name]):
            onnx_file.write(int8.module, example, tmp_path / "int8.onnx")
        return
    with quantize.engine(int8.engine):
        path = onnx_file.write(int8.module, example, tmp_path / "int8.onnx")
    for count in BATCHES:
        batch = networks.images(count, seed=5)
        fp32, expected = torch_logits(int8, batch)
        if name in REFUSED:
            with pytest.raises(RunError, match=r"openvino can't compile int8\.onnx: .*: take openvino out of runtimes"):
                answers(RuntimeName.openvino, path, batch)
        for runtime in [RuntimeName.onnxruntime] if name in REFUSED else THEIRS:
            assert times_rounding(fp32, expected, answers(runtime, path, batch)) < MOST, (runtime, count)


class Context(nn.Module):
    """Attention by one context vector, a sum over positions, as in MobileViTv2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.fc = nn.Conv2d(3, 33, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).split([1, 16, 16], dim=1)
        context = (torch.softmax(query, -1) * key).sum(-1, keepdim=True)
        return self.fc(self.proj(torch.relu(value) * context.expand_as(value)).mean((2, 3)))


@pytest.mark.parametrize("runtime", THEIRS)
def test_no_two_tensors_share_a_grid_which_openvino_changes_behind_a_sum(runtime: RuntimeName, tmp_path: Path) -> None:
    symmetric = spec(settings(overflow="weights", activation_scheme="symmetric"))  # all zero points are 128
    int8, batch = int8_of(trained(Context()), FlowName.fx, images(16), symmetric), images(16, seed=3)
    path = written(int8, tmp_path)
    graph = onnx.load(str(path)).graph
    grids = [tuple(node.input[1:]) for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(set(grids)) == len({zero_point for _, zero_point in grids}) == len(grids)
    read = {name for node in graph.node for name in node.input}
    assert {one.name for one in graph.initializer} <= read
    fp32, expected = torch_logits(int8, batch)
    assert times_rounding(fp32, expected, answers(runtime, path, batch)) < 1


class Reduced(nn.Module):
    """Means and sums of tokens, which a normalisation reads."""

    def __init__(self, over: tuple[int, ...], keep: bool, total: bool) -> None:
        super().__init__()
        self.over, self.keep, self.total = over, keep, total
        self.conv, self.fc = nn.Conv2d(3, 16, 1), nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.conv(x)).flatten(2)
        reduced = tokens.sum(self.over, self.keep) if self.total else tokens.mean(self.over, self.keep)
        scaled = reduced * torch.linspace(0.5, 2, reduced.shape[-1])
        return self.fc(scaled.reshape(x.shape[0], -1))


REDUCTIONS = [((1,), False), ((1,), True), ((2,), False), ((2,), True), ((1, 2), True)]


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize(("over", "keep"), REDUCTIONS)
def test_reductions_of_tokens_are_right_for_several_images(
    over: tuple[int, ...], keep: bool, total: bool, tmp_path: Path
) -> None:
    net, batch = Reduced(over, keep, total), images(33, seed=3)
    net(batch)
    trained(net)
    path = onnx_file.write(net, batch, tmp_path / "fp32.onnx")
    with torch.inference_mode():
        expected = net(batch).numpy()
    for runtime in THEIRS:
        np.testing.assert_allclose(answers(runtime, path, batch), expected, rtol=1e-4, atol=1e-4)
    int8 = int8_of(net, FlowName.fx, batch, spec(GUARDED))
    path = written(int8, tmp_path)
    fp32, expected = torch_logits(int8, batch)
    for runtime in THEIRS:
        assert times_rounding(fp32, expected, answers(runtime, path, batch)) < 1, runtime


@pytest.mark.parametrize("runtime", THEIRS)
def test_copies_answer_at_the_same_time_on_as_many_threads_as_torch_has(runtime: RuntimeName, tmp_path: Path) -> None:
    int8, batch = made("tiny", FlowName.eager), images(8)
    loaded = RUNTIMES[runtime].load(written(int8, tmp_path), nn.Identity, None)
    fp32, _ = torch_logits(int8, batch)
    alone = loaded(batch).numpy()  # on other numbers of threads, a value in the middle of two steps may go either way
    with threads(2):
        assert times_rounding(fp32, alone, loaded(batch).numpy()) < 1
    for copy in loaded.copies(2):
        assert times_rounding(fp32, alone, copy(batch).numpy()) < 1


FRESH = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
import torch
from qexp.config.schema import RuntimeName
from qexp.runtimes import RUNTIMES

runtime, path = RUNTIMES[RuntimeName(sys.argv[1])], Path(sys.argv[2])
models, start = [runtime.load(path, torch.nn.Identity, None) for _ in range(2)], Barrier(2)

def run(model):
    torch.set_num_threads(1)
    start.wait()
    return model(torch.zeros(1, 3, 16, 16))

with ThreadPoolExecutor(2) as pool:
    print(len(list(pool.map(run, models))))
"""


@pytest.mark.parametrize("runtime", THEIRS)
def test_its_first_use_may_be_in_two_threads_and_calls_nobody(runtime: RuntimeName, tmp_path: Path) -> None:
    path = written(made("tiny", FlowName.eager), tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", FRESH, runtime, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr
    assert list(home.rglob("*")) == []  # such as an identifier of this machine


# ------------------------------------------------------------------------------------------------ parting


def test_rounding_is_measured_against_what_quantization_costs() -> None:
    fp32, noise = np.zeros((4, 3), np.float32), np.float32([1, -1, 1])
    assert times_rounding(fp32, fp32 + noise, fp32 + noise) == 0
    assert times_rounding(fp32, fp32 + noise, fp32 - 2 * noise) == pytest.approx(3)
    assert times_rounding(fp32, fp32, fp32 + noise) == np.inf


@pytest.mark.parametrize("runtime", THEIRS)
def test_a_layer_that_is_wrong_in_a_runtime_is_found(runtime: RuntimeName, tmp_path: Path) -> None:
    int8 = made("tiny", FlowName.eager)
    path, batch = written(int8, tmp_path), like(int8, 33)
    fp32, expected = torch_logits(int8, batch)
    proto = onnx.load(str(path))
    wrong = next(node for node in proto.graph.node if node.name == "blocks.1.conv1")
    bias = next(one for one in proto.graph.initializer if one.name == wrong.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(5), bias.name))
    onnx.save(proto, str(path))
    assert times_rounding(fp32, expected, answers(runtime, path, batch)) > MOST
    named = RUNTIMES[runtime]
    assert isinstance(named, OnnxRuntime)
    with quantize.engine(int8.engine):
        layer, steps = first_parted(int8.module, batch, path, named)
    assert layer == "blocks.1.conv1"
    assert steps > 1


# ------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("runtime", THEIRS)
def test_a_package_that_is_not_installed_is_named(runtime: RuntimeName, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RUNTIMES[runtime].unavailable() is None, "make setup installs the extras"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == runtime else object())
    said = f"it needs the package {runtime}: pip install 'qexp[{runtime}]'"
    assert RUNTIMES[runtime].unavailable() == said


@pytest.mark.parametrize("runtime", THEIRS)
def test_flow_dynamic_runs_in_fp32_only(runtime: RuntimeName) -> None:
    assert RUNTIMES[runtime].executes(FlowName.dynamic, Precision.fp32)
    assert not RUNTIMES[runtime].executes(FlowName.dynamic, Precision.int8)
