"""The folder that ships serves the model without qexp, and its check tells when a machine answers otherwise."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qexp import quantize
from qexp.config.schema import ExportFormat, FlowName
from qexp.data.loading import normalise
from qexp.errors import RunError
from qexp.export import tensorrt
from qexp.export.folder import write
from qexp.models import architectures
from qexp.quantize import FLOWS, QuantizedModel
from qexp.system import machine
from tests.helpers.quantizable import settings, spec, trained

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)
INPUT = {"shape": [3, 16, 16], "classes": 10, "mean": list(MEAN), "std": list(STD)}
PIXELS = np.random.default_rng(0).integers(0, 256, (33, 3, 16, 16), dtype=np.uint8)
IMAGES = normalise(PIXELS, MEAN, STD)
WITHOUT_TORCH = (ExportFormat.onnx, ExportFormat.openvino, ExportFormat.tensorrt)


@cache
def int8_of(scheme: str = "symmetric") -> QuantizedModel:
    how = spec(settings(activation_scheme=scheme, overflow="weights"))
    flow = FLOWS[FlowName.eager]
    prepared = flow.prepare(flow.fuse(trained(architectures.tiny()), how, IMAGES[:2]), how, IMAGES[:2])
    quantize.calibrate(prepared, IMAGES.split(8))
    return flow.convert(prepared)


def exported(folder: Path, form: ExportFormat, batch_size: int = 1) -> str:
    facts = {"input": INPUT, "scales": {}, "metrics": {"accuracy/int8": 0.5}, "run": {"id": "1"}}
    return write(folder, form, batch_size, int8_of(), PIXELS, IMAGES, facts)


def checked(folder: Path, form: ExportFormat) -> subprocess.CompletedProcess[str]:
    """Run the check as its own process; without torch where the format does without, and always without qexp."""
    missing = ["qexp", *(["torch"] if form in WITHOUT_TORCH else [])]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({missing})); sys.path.insert(0, '.'); "
        "runpy.run_path('check.py', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True)


AOTI = pytest.param(ExportFormat.aoti, marks=pytest.mark.slow)  # it compiles


@pytest.mark.parametrize("form", [AOTI if form is ExportFormat.aoti else form for form in ExportFormat])
def test_the_folder_serves_the_model_without_qexp(form: ExportFormat, tmp_path: Path) -> None:
    """One image and 33 at once; in a format that fixes the batch size, by a folder for each."""
    fixed = form is ExportFormat.openvino
    for size in (1, 33) if fixed else (4,):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        said = exported(tmp_path / "model", form, batch_size=size)
        assert f"pip install numpy {form.needs[0]}" in said
        if form is ExportFormat.aoti:
            check_other_cpus_are_refused(tmp_path / "model")
        done = checked(tmp_path / "model", form)
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.splitlines()
        assert [line.partition(":")[0] for line in lines] == [
            f"batch of {count}" for count in ((size,) if fixed else (1, 33))
        ]
        assert all(line.endswith("100% of predictions agree") for line in lines)
        assert last == "ok"
    assert json.loads((tmp_path / "model" / "input.json").read_text())["mean"] == list(MEAN)
    assert json.loads((tmp_path / "model" / "metrics.json").read_text()) == {"accuracy/int8": 0.5}


def check_other_cpus_are_refused(folder: Path) -> None:
    takes = json.loads((folder / "input.json").read_text())
    assert takes["cpu_features"] == sorted(machine.features())
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    (other / "input.json").write_text(json.dumps(takes | {"cpu_features": ["avx2048"]}))
    done = checked(other, ExportFormat.aoti)
    assert done.returncode == 1
    assert done.stderr == "This CPU lacks avx2048: export the model on one like it.\n"


# Float models of format=aoti differ in nothing but the model from INT8 ones.
@pytest.mark.parametrize("form", [form for form in ExportFormat if form.float_too and form is not ExportFormat.aoti])
def test_the_folder_serves_a_float_model_too(form: ExportFormat, tmp_path: Path) -> None:
    model, facts = int8_of().fused, {"input": INPUT, "scales": {}, "metrics": {}, "run": {"id": "1"}}
    assert "the FP32 model" in write(tmp_path, form, 4, model, PIXELS, IMAGES, facts)
    done = checked(tmp_path, form)
    assert done.stdout.endswith("ok\n"), done.stderr
    assert not list(tmp_path.glob("int8*"))
    with np.load(tmp_path / "check.npz") as stored, torch.inference_mode():
        np.testing.assert_allclose(stored["logits"], model(IMAGES).numpy(), atol=1e-4)


def test_the_check_tells_when_answers_are_others(tmp_path: Path) -> None:
    exported(tmp_path, ExportFormat.onnx)
    with np.load(tmp_path / "check.npz") as stored:
        arrays = dict(stored)
    arrays["logits"] = arrays["logits"][::-1]
    np.savez(tmp_path / "check.npz", **arrays)
    done = checked(tmp_path, ExportFormat.onnx)
    assert done.returncode == 1
    assert "More than rounding" in done.stderr


SERVED = """
import sys

sys.modules["qexp"] = None
sys.path.insert(0, ".")
import numpy as np
from serve import logits

assert "torchao" in sys.modules
np.save("answers.npy", logits(np.load("check.npz")["images"]))
"""


@pytest.mark.slow
def test_a_program_of_pt2e_is_served_by_torchao_and_holds_each_weight_once(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")
    how, flow = spec(settings(overflow="weights")), FLOWS[FlowName.pt2e]
    net = trained(architectures.tiny(width=96))
    prepared = flow.prepare(flow.fuse(net, how, IMAGES[:2]), how, IMAGES[:2])
    quantize.calibrate(prepared, IMAGES.split(8))
    facts = {"input": INPUT, "scales": {}, "metrics": {}, "run": {"id": "1"}}
    write(tmp_path, ExportFormat.pt2, 1, flow.convert(prepared), PIXELS, IMAGES, facts)

    layers = [part for part in net.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    channels = sum(len(layer.weight) for layer in layers)  # a float32 bias and scale, and an int8 zero point
    size = (tmp_path / "int8.pt2").stat().st_size
    assert weights + 9 * channels < size < weights + 9 * channels + 300_000  # the graph as text, and an example
    assert 4 * weights > 2_700_000

    done = subprocess.run([sys.executable, "-c", SERVED], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # torchao's words on libraries for GPUs are no news
    with np.load(tmp_path / "check.npz") as stored:
        np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), stored["logits"], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ TensorRT


def read_cache(text: str) -> dict[str, float]:
    """The scales of a calibration cache, read as TensorRT's documentation describes it."""
    header, *lines = text.splitlines()
    assert re.fullmatch(r"TRT-\d+-EntropyCalibration2", header)
    pairs = (re.fullmatch(r"(.+): ([0-9a-f]{8})", line) for line in lines)
    return {pair[1]: struct.unpack(">f", bytes.fromhex(pair[2]))[0] for pair in pairs if pair}


def test_a_line_of_the_cache_is_a_name_and_a_big_endian_float() -> None:
    assert tensorrt.cache_text({"data": 1.0, "fc: 1": 1 / 127}).splitlines()[1:] == [
        "data: 3f800000",
        "fc: 1: 3c010204",
    ]
    assert read_cache("TRT-8501-EntropyCalibration2\ndata: 40490fdb\n") == {"data": pytest.approx(np.pi)}


def test_tensorrt_gets_zero_points_of_0_and_the_scale_of_each_tensor(tmp_path: Path) -> None:
    exported(tmp_path, ExportFormat.tensorrt)
    proto = onnx.load(str(tmp_path / "int8.onnx"))
    values = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    around = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(values[node.input[2]].dtype == np.int8 and not values[node.input[2]].any() for node in around)
    by_channel = [node for node in around if values[node.input[1]].ndim]
    assert len(by_channel) == 7
    assert all(node.attribute[0].i == 0 for node in by_channel)
    makers = {output: node.op_type for node in proto.graph.node for output in node.output}
    assert all(makers[node.input[0]] == "QuantizeLinear" for node in around
               if node.op_type == "DequantizeLinear" and node.input[0] in makers)  # fmt: skip

    scales = read_cache((tmp_path / "calibration.cache").read_text())
    plain = onnx.load(str(tmp_path / "float.onnx")).graph
    assert not {node.op_type for node in plain.node} & {"QuantizeLinear", "DequantizeLinear", "Clip"}
    tensors = {"images", *(output for node in plain.node for output in node.output)}
    assert set(scales) <= tensors
    assert set(map(np.float32, scales.values())) == {
        np.float32(q.scale[0]) for name, q in int8_of().qparams.items() if not name.endswith(".weight")
    }


def test_the_float_model_beside_the_cache_computes_the_same_without_rounding(tmp_path: Path) -> None:
    import onnxruntime

    exported(tmp_path, ExportFormat.tensorrt)
    both = [
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(
            None, {"images": IMAGES.numpy()}
        )[0]
        for name in ("int8.onnx", "float.onnx")
    ]
    assert np.abs(both[0] - both[1]).max() < 0.1 * np.abs(both[1]).max()


def test_other_zero_points_are_refused_with_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"zero points of 0 only, and that of quant is -?\d+: quantize with qconfig\.act"
    ):
        write(tmp_path, ExportFormat.tensorrt, 1, int8_of("asymmetric"), PIXELS, IMAGES, {"input": INPUT})
