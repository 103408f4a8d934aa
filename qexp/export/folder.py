"""The folder that ships: a model, the code that serves it, and a script that checks its answers, without qexp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.config.schema import ExportFormat, RuntimeName
from qexp.errors import RunError
from qexp.export import tensorrt
from qexp.quantize import QuantizedModel
from qexp.records import Precision
from qexp.runtimes import RUNTIMES, onnx_file, saved_models
from qexp.runtimes.base import packing_for
from qexp.system import machine

TOLERANCE = 0.05
"""Allowed difference of logits, as a share of the largest, on another machine: kernels of another CPU round otherwise,
by a few steps of the logits' grid, which has 255. Kernels whose 16-bit sums saturate differ by more, and should."""

_SERVE = '''"""Serves the model beside it: `logits(images)`, float32 [n, classes] of uint8 [n, 3, H, W], RGB."""

import json
from pathlib import Path

import numpy as np
{imports}

here = Path(__file__).resolve().parent
takes = json.loads((here / "input.json").read_text())
mean, std = (np.array(takes[name], np.float32).reshape(1, 3, 1, 1) for name in ("mean", "std"))
{load}


def logits(images):
    values = (images.astype(np.float32) / np.float32(255) - mean) / std
{call}
'''

_CHECK = '''"""Compares the model's answers on this machine with those where it was exported."""

import sys
from pathlib import Path

import numpy as np
from serve import logits

stored = np.load(Path(__file__).resolve().parent / "check.npz")
images, expected, size = stored["images"], stored["logits"], int(stored["batch_size"])
sizes = [size] if size else [1, len(images)]
for size in sizes:
    batches = [images[start : start + size] for start in range(0, len(images) - size + 1, size)]
    found = np.concatenate([np.asarray(logits(batch)) for batch in batches])
    kept = expected[: len(found)]
    difference = np.abs(found - kept).max() / np.abs(kept).max()
    same = (found.argmax(1) == kept.argmax(1)).mean()
    print(f"batch of {{size}}: logits differ by {{difference:.2g}} of the largest, {{same:.0%}} of predictions agree")
    if not difference <= {tolerance}:
        sys.exit(
            "More than rounding: this machine's kernels compute otherwise. On a CPU without VNNI, 16-bit sums may "
            "saturate; quantize with qconfig.overflow=weights for it."
        )
print("ok")
'''

_ONNX = {
    "imports": "import onnxruntime",
    "load": 'session = onnxruntime.InferenceSession(str(here / "MODEL.onnx"), providers=["CPUExecutionProvider"])',
    "call": f'    return session.run(["{onnx_file.OUTPUT}"], {{"{onnx_file.INPUT}": values}})[0]',
}
_TORCH_CALL = "    with torch.inference_mode():\n        return model(torch.from_numpy(values)).numpy()"
_CODE: Mapping[ExportFormat, Mapping[str, str]] = {
    ExportFormat.onnx: _ONNX,
    ExportFormat.tensorrt: _ONNX,
    ExportFormat.openvino: {
        "imports": "import openvino",
        "load": (
            'options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}\n'
            'model = openvino.Core().compile_model(str(here / "MODEL.xml"), "CPU", options)'
        ),
        "call": "    return model(values)[0]",
    },
    ExportFormat.torchscript: {
        "imports": "import torch",
        "load": (
            "# INT8 weights are packed for the engine that is set when the model is loaded, and run under that only.\n"
            'torch.backends.quantized.engine = takes.get("engine", torch.backends.quantized.engine)\n'
            'model = torch.jit.load(str(here / "MODEL.ts.pt")).eval()'
        ),
        "call": _TORCH_CALL,
    },
    ExportFormat.aoti: {
        "imports": "import torch",
        "load": (
            "# It was compiled for a CPU with these features, and would crash without them.\n"
            'has = set(Path("/proc/cpuinfo").read_text().split())\n'
            'if lacking := set(takes["cpu_features"]) - has:\n'
            "    raise SystemExit(f\"This CPU lacks {', '.join(sorted(lacking))}: export the model on one like it.\")\n"
            'model = torch._inductor.aoti_load_package(str(here / "MODEL.pt2"))'
        ),
        "call": _TORCH_CALL.replace("from_numpy(values)", "from_numpy(np.ascontiguousarray(values))"),
    },
    ExportFormat.pt2: {
        "imports": (
            "import logging\n\n"
            "import torch\n\n"
            'for name in ("torchao", "torch.utils._pytree"):  # of what GPUs alone need\n'
            "    logging.getLogger(name).setLevel(logging.ERROR)\n"
            "try:  # either registers the operators that quantize and dequantize\n"
            "    import torchao.quantization.pt2e.quantize_pt2e\n"
            "except ImportError:\n"
            "    import torch.ao.quantization.fx._decomposed"
        ),
        "load": 'model = torch.export.load(str(here / "MODEL.pt2")).module()',
        "call": _TORCH_CALL,
    },
}


def write(
    folder: Path,
    form: ExportFormat,
    batch_size: int,
    model: QuantizedModel | nn.Module,
    pixels: np.ndarray,
    images: Tensor,
    facts: Mapping[str, Any],
    kept: Path | None = None,
) -> str:
    """Write the model with all that ships beside it, and return what to print.

    model: in INT8, or a float one, which pt2 and tensorrt don't take; batch_size: of formats that fix it; pixels,
    images: uint8 and float32 [n, 3, H, W], the same, whole batches for the check; facts: what the other files hold, by
    their names; kept: the cache's folder, for what takes long to compile. Raises RunError where the model can't be
    written in this format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fixed = batch_size if form is ExportFormat.openvino else 0
    engine = model.engine if isinstance(model, QuantizedModel) else None
    precision = Precision.fp32 if engine is None else Precision.int8
    with packing_for(engine):
        logits = _model(folder / precision, form, batch_size, model, images, kept)
    takes = facts["input"] | ({"engine": str(engine)} if engine and form is ExportFormat.torchscript else {})
    if form is ExportFormat.aoti:
        takes |= {"cpu_features": sorted(machine.features())}
    for name, value in {**facts, "input": takes}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    (folder / "serve.py").write_text(_SERVE.format(**_CODE[form]).replace("MODEL", precision))
    (folder / "check.py").write_text(_CHECK.format(tolerance=TOLERANCE))
    np.savez_compressed(folder / "check.npz", images=pixels, logits=logits, batch_size=fixed)
    version = f"=={torch.__version__.partition('+')[0]}" if form is ExportFormat.aoti else ""
    needs = " ".join(("numpy", *(name + version for name in form.needs)))
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith(f"{precision}.")) / 1e6
    return (
        f"{folder}: the {precision.upper()} model as {form}, {size:.1f} MB\n"
        f"It needs: pip install {needs}\n"
        f"Serve it: python -i {folder / 'serve.py'}, which defines logits(images) for uint8 images [n, 3, H, W]\n"
        f"Check it where it will run: python {folder / 'check.py'}"
    )


def _model(
    stem: Path,
    form: ExportFormat,
    batch_size: int,
    model: QuantizedModel | nn.Module,
    images: Tensor,
    kept: Path | None,
) -> np.ndarray:
    """Write the model's file, and return its logits of images, as the runtime that serves it computes them.

    stem: the file's path without its suffix; the rest as of `write`.
    """
    example = images[:2]
    module, engine = (model.module, model.engine) if isinstance(model, QuantizedModel) else (model, None)
    match form:
        case ExportFormat.torchscript:
            runtime = RUNTIMES[RuntimeName.torchscript]
            path = runtime.export(module, example, stem.with_suffix(".ts.pt"))
            return runtime.load(path, lambda: module, engine)(images).numpy()
        case ExportFormat.aoti:
            runtime, path = _runtime(RuntimeName.inductor), stem.with_suffix(".pt2")
            saved_models.export(runtime, module, example, path, kept)
            return _answers(RuntimeName.inductor, path, images)
        case ExportFormat.pt2:
            if not isinstance(model, QuantizedModel):
                raise RunError("format=pt2 is of INT8 models only.")
            program = model.qdq_program(example)
            torch.export.save(program, stem.with_suffix(".pt2"))
            with torch.inference_mode():
                logits: np.ndarray = program.module()(images).numpy()
            return logits
        case ExportFormat.onnx:
            path = onnx_file.write(module, example, stem.with_suffix(".onnx"))
        case ExportFormat.tensorrt:
            path = onnx_file.write(module, example, stem.with_suffix(".onnx"))
            tensorrt.convert(path, stem.with_name("calibration.cache"))
        case ExportFormat.openvino:
            return _openvino(stem, batch_size, module, images)
    return _answers(RuntimeName.onnxruntime, path, images)


def _openvino(stem: Path, batch_size: int, module: nn.Module, images: Tensor) -> np.ndarray:
    runtime = _runtime(RuntimeName.openvino)
    from qexp.runtimes.openvino import package

    openvino = package()
    path = onnx_file.write(module, images[:2], stem.with_suffix(".onnx"))
    model = openvino.Core().read_model(str(path))
    model.reshape([batch_size, *images.shape[1:]])
    openvino.save_model(model, str(stem.with_suffix(".xml")), compress_to_fp16=False)
    loaded = runtime.load(path, torch.nn.Identity, None)
    logits = np.concatenate([loaded(batch).numpy() for batch in images.split(batch_size)])
    path.unlink()
    return logits


def _answers(name: RuntimeName, path: Path, images: Tensor) -> np.ndarray:
    logits: np.ndarray = _runtime(name).load(path, torch.nn.Identity, None)(images).numpy()
    return logits


def _runtime(name: RuntimeName) -> Any:
    if reason := RUNTIMES[name].unavailable():
        raise RunError(f"this format can't be written here: {reason}.")
    return RUNTIMES[name]
