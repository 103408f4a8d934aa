"""Packages of AOTInductor: their INT8 layers are kernels of oneDNN, they answer as torch but for rounding, and they are
refused where they can't run.

To compile takes half a minute, so all tests share a few packages, kept by what they are made of. Weights have 7 bits:
without VNNI, sums in 16 bits would saturate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp import quantize
from qexp.config.schema import FlowName, RuntimeName
from qexp.errors import RunError
from qexp.latency.protocol import threads
from qexp.models import architectures
from qexp.quantize import FLOWS, QuantizedModel
from qexp.records import Precision
from qexp.runtimes import RUNTIMES, inductor, saved_models
from qexp.runtimes.parting import MOST, first_parted, times_rounding
from qexp.system import machine
from tests.helpers.quantizable import Plain, images, settings, spec, trained

INDUCTOR = RUNTIMES[RuntimeName.inductor]
BATCHES = (1, 33)


def int8_of(net: nn.Module, flow: FlowName, granularity: str, weight_scheme: str = "symmetric") -> QuantizedModel:
    how = spec(settings(overflow="weights", granularity=granularity, weight_scheme=weight_scheme))
    batch = images(16, seed=3)
    prepared = FLOWS[flow].prepare(FLOWS[flow].fuse(net, how, batch[:2]), how, batch[:2])
    quantize.calibrate(prepared, batch.split(8))
    return FLOWS[flow].convert(prepared)


@pytest.fixture(scope="module")
def per_tensor() -> QuantizedModel:
    return int8_of(trained(architectures.tiny()), FlowName.eager, "per_tensor")


@pytest.fixture(scope="module")
def package(per_tensor: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged(per_tensor, tmp_path_factory.mktemp("packages"))


def packaged(int8: QuantizedModel, folder: Path, precision: Precision = Precision.int8) -> Path:
    path = folder / INDUCTOR.file(precision)
    model = int8.module if precision is Precision.int8 else int8.fused
    with quantize.engine(int8.engine):
        saved_models.export(INDUCTOR, model, images(2), path, folder / "cache")
    return path


def check(int8: QuantizedModel, path: Path) -> None:
    """All layers run in INT8, and answers differ from torch's by rounding only, and not with the batch size."""
    assert INDUCTOR.layers(path, (1, 3, 16, 16)) == (len(int8.layers), 0)
    loaded = INDUCTOR.load(path, nn.Identity, None)
    for count in BATCHES:
        batch = images(count, seed=count)
        with quantize.engine(int8.engine), torch.inference_mode():
            fp32, expected = int8.fused(batch).numpy(), int8.module(batch).numpy()
        found = loaded(batch)
        assert found.shape == (count, 10)
        assert times_rounding(fp32, expected, found.numpy()) < MOST
        torch.testing.assert_close(torch.cat([loaded(one) for one in batch.split(1)]), found, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_weights_of_one_scale_run_in_int8_too(per_tensor: QuantizedModel, package: Path) -> None:
    check(per_tensor, package)


@pytest.mark.slow
def test_so_does_a_network_that_is_traced(tmp_path: Path) -> None:
    int8 = int8_of(trained(Plain()), FlowName.fx, "per_channel")
    check(int8, packaged(int8, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(bool(FlowName.pt2e.missing), reason="torchao is not installed")
def test_so_does_one_that_torch_exports(tmp_path: Path) -> None:
    int8 = int8_of(trained(Plain()), FlowName.pt2e, "per_channel")
    check(int8, packaged(int8, tmp_path))


@pytest.mark.slow
def test_it_runs_on_as_many_threads_as_torch_has_and_copies_at_the_same_time(package: Path) -> None:
    loaded, batch = INDUCTOR.load(package, nn.Identity, None), images(8)
    alone = loaded(batch)
    with threads(2):
        assert torch.equal(loaded(batch), alone)
    copies = loaded.copies(2)
    assert len({id(one.module) for one in (loaded, *copies)}) == 3
    assert all(torch.equal(copy(batch), alone) for copy in copies)
    assert torch.equal(loaded(batch.contiguous(memory_format=torch.channels_last)), alone)


@pytest.mark.slow
def test_a_layer_that_is_wrong_is_found(
    per_tensor: QuantizedModel, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that differs from the model's program, in a package of another model: one bias is shifted."""
    right = type(INDUCTOR).program

    def wrong(self: object, model: nn.Module, example: torch.Tensor) -> torch.fx.GraphModule:
        program = right(INDUCTOR, model, example)  # type: ignore[arg-type]
        biases = [node.args[2] for node in program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
        program.get_buffer(biases[3].target).add_(5)
        return program

    with quantize.engine(per_tensor.engine):
        monkeypatch.setattr(type(INDUCTOR), "program", wrong)
        found = INDUCTOR.codes(per_tensor.module, package, images(8))
        monkeypatch.undo()
        monkeypatch.setattr(INDUCTOR, "codes", lambda *_: found)
        layer, steps = first_parted(per_tensor.module, images(8), package, INDUCTOR)
    assert layer == "blocks.1.conv1"
    assert steps > 1


@pytest.mark.slow
def test_another_cpu_is_refused_in_a_sentence(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = inductor.notes(package)
    assert recorded["cpu_features"] == sorted(machine.features())
    assert recorded["seconds"] == INDUCTOR.compile_seconds(package) > 1
    lost = recorded["cpu_features"][0]
    monkeypatch.setattr(machine, "features", lambda: frozenset(recorded["cpu_features"]) - {lost})
    with pytest.raises(RunError, match=rf"int8_inductor\.pt2 was compiled for a CPU with {lost}, which this one lacks"):
        INDUCTOR.load(package, nn.Identity, None)


@pytest.mark.slow
def test_a_model_that_is_compiled_to_float_has_no_layer_in_int8(
    per_tensor: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without freezing, as torch does it unless told otherwise; so the count can tell."""
    monkeypatch.delitem(inductor.OPTIONS, "freezing")
    with quantize.engine(per_tensor.engine):
        path = INDUCTOR.export(per_tensor.module, images(2), tmp_path / "float.pt2")
    assert INDUCTOR.layers(path, (1, 3, 16, 16)) == (0, 7)


@pytest.mark.parametrize("wrong", [lambda images: images[:2, 0, 0], lambda images: images[:, 0, 0] * len(images)])
def test_a_package_that_answers_otherwise_for_three_images_than_for_one_is_refused(
    wrong: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: lambda images: images[:, 0, 0])
    inductor._check_open(Path("right.pt2"), images(1))
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: wrong)
    with pytest.raises(RunError, match="inductor compiled the model for one number of images only: take inductor out"):
        inductor._check_open(Path("wrong.pt2"), images(1))


def test_weights_with_zero_points_are_refused_in_a_sentence() -> None:
    int8 = int8_of(trained(architectures.tiny()), FlowName.eager, "per_channel", weight_scheme="asymmetric")
    with quantize.engine(int8.engine), pytest.raises(RunError, match="inductor takes symmetric weights only: quantize"):
        INDUCTOR.export(int8.module, images(2), Path("int8.pt2"))


def test_a_file_that_is_no_package_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "int8.pt2").write_bytes(b"none")
    with pytest.raises(RunError, match=r"inductor can't load int8\.pt2: it is no package that qexp compiled"):
        INDUCTOR.load(tmp_path / "int8.pt2", nn.Identity, None)


def test_packages_are_kept_by_all_that_they_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(int8: QuantizedModel) -> str:
        with quantize.engine(int8.engine):
            return INDUCTOR.key(int8.module, images(2))

    def made(seed: int = 0, granularity: str = "per_tensor") -> QuantizedModel:
        return int8_of(trained(architectures.tiny(), seed), FlowName.eager, granularity)

    same = key(made())
    assert key(made()) == same
    others = [key(made(seed=1)), key(made(granularity="per_channel"))]
    monkeypatch.setattr(machine, "features", lambda: frozenset({"neon"}))
    others.append(key(made()))
    assert len({same, *others}) == 4
