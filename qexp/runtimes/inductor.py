"""AOTInductor: compiles the model's program ahead of time into a package, with oneDNN's kernels for INT8 layers.

What is evaluated, timed and shipped is this one file. It is compiled for the CPU that compiles it, whose features it
records. torch lowers INT8 layers only with freezing among the options of the compilation itself and outside of
gradients, and only with weights by channel and clamps of float tensors: it compiles anything else to FP32 without a
word (torch 2.13), so `layers` counts kernels in the package's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qexp.config import code_digest, schema
from qexp.config.schema import Engine
from qexp.errors import RunError, first_line
from qexp.quantize import qdq
from qexp.quantize.calibration.grid import QUANT_MAX
from qexp.quantize.saturation import kernels
from qexp.quantize.torch_backend.unpacked_weights import packed_for_one_image
from qexp.records import Precision, Variant
from qexp.runtimes.base import Loaded, Runtime
from qexp.system import machine
from qexp.system.quiet import quiet

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = decomposed.dequantize_per_channel.default
OPTIONS = {
    "freezing": True,
    "cpp.dynamic_threads": True,  # else it runs on as many threads as torch has while it is compiled
    "cpp.threads": 1,  # so that the code doesn't depend on that number either
    "compile_threads": 1,  # no pool of processes that outlives the job
}
SAME = 1e-3  # of the largest logit: sums in FP32
NOTES = "qexp.json"
"""The file in a package that says what it was compiled for."""
_PRODUCTS = re.compile(r"\baoti_torch_cpu_\w*(?:conv|_q?linear|addmm|_mm|bmm)\w*(?=\()")
_INT8_PRODUCTS = ("aoti_torch_cpu__qconv", "aoti_torch_cpu__qlinear")


class Inductor(Runtime):
    name = schema.RuntimeName.inductor
    reads_program = True
    rounds_otherwise = True
    kernels_of = Engine.onednn

    def unavailable(self) -> str | None:
        """As in the base class: a clause where torch finds no C++ compiler."""
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            named = os.environ.get("CXX")
            if named:
                return f"CXX={named} is no C++ compiler for it: mend or unset it"
            return "there is no C++ compiler for it: install g++ or clang (or name one in the environment variable CXX)"
        return None

    def file(self, precision: Precision) -> str:
        return f"{Variant(precision, self.name)}.pt2"

    def program(self, model: nn.Module, example: Tensor) -> fx.GraphModule:
        """As in the base class, in the form of which torch makes INT8 kernels.

        Raises RunError for weights with other zero points than 0, which its kernels take for 0 (torch 2.13).
        """
        made = super().program(model, example)
        nodes: list[Any] = list(made.graph.nodes)
        for node in nodes:
            if node.target is DEQUANTIZE and node.args[0].op == "get_attr":
                _weights_by_channel(made, node)
            elif node.target is aten.clamp.default and node.args[0].target is QUANTIZE:
                _clamp_before(made.graph, node)
        made.graph.eliminate_dead_code()
        made.recompile()
        dequantize = [node for node in made.graph.nodes if node.target is DEQUANTIZE_CHANNELS]
        if any(made.get_buffer(node.args[2].target).any() for node in dequantize):
            raise RunError(
                "inductor takes symmetric weights only: quantize with qconfig.weight.scheme=symmetric, or take "
                "inductor out of runtimes"
            )
        return made

    def key(self, model: nn.Module, example: Tensor) -> str:
        """As in the base class: the program, its constants, and all that compiles it."""
        from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

        program = self.program(model, example)
        constants = [
            [name, str(value.dtype), list(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()]
            for name, value in program.named_buffers()
        ]
        compiler = get_compiler_version_info(get_cpp_compiler())
        made_of = [program.code, constants, list(example.shape[1:]), compiler, sorted(machine.features())]
        return json.dumps(["package", made_of, kernels.computed_by(1), code_digest.of("runtimes")])

    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        """As in the base class: compile the model's program, which takes half a minute or more."""
        return _compile(self.program(model, example), example, path)

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Open the package; it runs on as many threads as torch has where it is called, one call at a time.

        Raises RunError where it was compiled for a CPU with features that this one lacks, or can't be read.
        """
        lacking = set(notes(path)["cpu_features"]) - machine.features()
        if lacking:
            raise RunError(
                f"{path.name} was compiled for a CPU with {', '.join(sorted(lacking))}, which this one lacks: "
                "compile it anew on this machine."
            )
        return Loaded(_Package(path), None, again=lambda: self.load(path, structure, engine), reentrant=False)

    def layers(self, path: Path, shape: Sequence[int]) -> tuple[int, int]:
        """As in the base class, from the calls in the package's C++ code."""
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
            code = "\n".join(archive.read(name).decode() for name in names)
        products = _PRODUCTS.findall(code)
        int8 = sum(name.startswith(_INT8_PRODUCTS) for name in products)
        return int8, len(products) - int8

    def compile_seconds(self, path: Path) -> float | None:
        return float(notes(path)["seconds"])

    def codes(self, model: nn.Module, path: Path, images: Tensor) -> list[np.ndarray]:
        """As in the base class, from a package of its own, compiled with these outputs."""
        program = self.program(model, images)
        (output,) = (node for node in program.graph.nodes if node.op == "output")
        output.args = ((*output.args, *qdq.quantizing(program.graph)),)
        program.recompile()
        with tempfile.TemporaryDirectory(prefix="qexp-inductor-") as folder, torch.inference_mode():
            _, *found = _Package(_compile(program, images, Path(folder) / path.name)).outputs(images)
        return [codes.numpy() for codes in found]


def _weights_by_channel(program: fx.GraphModule, node: Any) -> None:
    """Write a weight's one scale for each channel, in place. node: dequantizes it."""
    codes, scale, zero_point, *bounds = node.args
    weight = program.get_buffer(codes.target)
    with program.graph.inserting_before(node):
        of_channels = []
        for name, values in (
            ("scales", torch.full((len(weight),), scale)),
            ("zero_points", torch.full((len(weight),), zero_point, dtype=torch.int8)),
        ):
            buffer = f"{codes.target}_{name}".replace(".", "_")
            program.register_buffer(buffer, values)
            of_channels.append(program.graph.get_attr(buffer))
        by_channel = program.graph.call_function(DEQUANTIZE_CHANNELS, (codes, *of_channels, 0, *bounds))
    node.replace_all_uses_with(by_channel)


def _clamp_before(graph: fx.Graph, node: Any) -> None:
    """Clamp a float tensor before it is quantized instead of its codes: rounding is monotone, so that this is the same.

    node: clamps them.
    """
    quantize, low, high = node.args
    values, scale, zero_point, *grid = quantize.args
    with graph.inserting_before(quantize):
        if (low, high) == (zero_point, QUANT_MAX):
            clamped = graph.call_function(aten.relu.default, (values,))
        else:
            bounds = ((low - zero_point) * scale, (high - zero_point) * scale)
            clamped = graph.call_function(aten.hardtanh.default, (values, *bounds))
        codes = graph.call_function(QUANTIZE, (clamped, scale, zero_point, *grid))
    codes.meta = dict(quantize.meta)
    node.replace_all_uses_with(codes)


def _compile(program: fx.GraphModule, example: Tensor, path: Path) -> Path:
    """Save a package of the program, with notes.

    Raises RunError where it can't be compiled, or only for one number of images.
    """
    import torch._inductor
    from torch.export.pt2_archive._package import package_pt2

    exported = qdq.exported(program, torch.cat([example[:1], example[:1]]))
    started = time.perf_counter()
    temporary = tempfile.TemporaryDirectory(prefix="qexp-inductor-")
    with (
        temporary as folder,
        torch.no_grad(),
        quiet("torch._inductor", "torch._export", "torch.export"),
        packed_for_one_image() as packing,
    ):
        options = OPTIONS | packing | {"aot_inductor.package": True, "aot_inductor.output_path": folder}
        try:
            module = exported.module(check_guards=False)
            files: Any = torch._inductor.aot_compile(module, exported.example_inputs[0], options=options)
        except Exception as error:  # of several classes, of the compiler's own too
            reason = first_line(error)
            raise RunError(f"inductor can't compile the model: {reason}: take inductor out of runtimes") from error
        said = {"cpu_features": sorted(machine.features()), "seconds": time.perf_counter() - started}
        package = Path(folder) / "model.pt2"
        package_pt2(str(package), aoti_files=files, extra_files={NOTES: json.dumps(said)})
        _check_open(package, example[:1])
        shutil.move(package, path)
    return path


def _check_open(package: Path, image: Tensor) -> None:
    """Raise RunError where a package answers otherwise for three images than for one: torch took their number for
    fixed."""
    with torch.inference_mode():
        one, three = (_Package(package).outputs(torch.cat([image] * count))[0] for count in (1, 3))
    if len(three) != 3 or not torch.allclose(three, one, rtol=0, atol=SAME * float(one.abs().max())):
        raise RunError("inductor compiled the model for one number of images only: take inductor out of runtimes")


def notes(path: Path) -> dict[str, Any]:
    """The file of notes in a package: the features of the CPU that it was compiled for, and the seconds that took.

    Raises RunError where the file is no package of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/extra/{NOTES}"))
            found: dict[str, Any] = json.loads(archive.read(name))
            return found
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise RunError(f"inductor can't load {path.name}: it is no package that qexp compiled.") from error


class _Package(nn.Module):
    """Runs a package, whose code takes contiguous images only and doesn't check that they are."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import torch._inductor

        self._run = torch._inductor.aoti_load_package(str(path))

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]

    def outputs(self, images: Tensor) -> Sequence[Tensor]:
        found: Tensor | Sequence[Tensor] = self._run(images.contiguous())
        return [found] if isinstance(found, Tensor) else found
