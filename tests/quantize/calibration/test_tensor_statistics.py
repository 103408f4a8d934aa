"""Statistics of calibration: merged parts equal the whole, nothing is lost, and ranges are torch's own."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver

from qexp import quantize
from qexp.config.schema import Engine, FlowName, Observer, QConfig
from qexp.errors import RunError
from qexp.latency import protocol
from qexp.models import architectures
from qexp.quantize import FLOWS, Prepared
from qexp.quantize.calibration import cached, statistics_collector
from qexp.quantize.calibration.observers import observers
from qexp.quantize.calibration.passes import calibrate
from qexp.quantize.calibration.recorder import Recorder
from qexp.quantize.calibration.statistics_collector import StatisticsCollector, statistics
from qexp.quantize.calibration.tensor_statistics import SHIFT, TensorStats, merge
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.quantize.torch_backend.observers import RecordingObserver, activation_observer
from tests.helpers.quantizable import MINMAX, RECORDED, Chain, Plain, images, settings, spec, trained

MOVING = RECORDED["moving_average"]


def values(kind: str, count: int = 5000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "after a ReLU": normal.relu(),
        "negative": -normal.abs() - 0.5,
        "wide": torch.exp(8 * normal) * normal.sign(),
        "zeros": torch.zeros(count),
        "negative zeros": -torch.zeros(count),
        "constant": torch.full((count,), 0.7),
        "tiny": normal * 1e-30,
        "denormal": normal * 1e-40,
        "huge": normal * 1e30,
        "largest": normal.sign() * torch.finfo(torch.float32).max,
    }[kind]


KINDS = [
    "normal", "after a ReLU", "negative", "wide", "zeros", "negative zeros", "constant", "tiny", "denormal", "huge",
    "largest",
]  # fmt: skip


def same(first: TensorStats, second: TensorStats) -> bool:
    names = ("minima", "maxima", "keys", "counts")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_counted_in_the_bin_that_holds_it(kind: str) -> None:
    x = values(kind)
    found = statistics(x)
    assert found.count == len(x) == found.counts.sum()
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    bins, exact = found.bins, np.sort(x.double().numpy())
    assert (np.diff(found.keys) > 0).all()
    assert (bins.counts > 0).all()
    assert (bins.lower[1:] >= bins.upper[:-1]).all()
    # In ascending order the first bin holds the first values, the second the next, …
    ends = np.cumsum(bins.counts)
    assert (exact[ends - bins.counts] >= bins.lower).all()
    assert (exact[ends - 1] <= bins.upper).all()
    normal = np.minimum(np.abs(bins.lower), np.abs(bins.upper)) > 2e-38
    width = (bins.upper - bins.lower) / np.minimum(np.abs(bins.lower), np.abs(bins.upper)).clip(1e-300)
    assert (width[normal] <= 1 / 512).all()


@pytest.mark.parametrize("kind", KINDS)
def test_absolute_values_are_those_of_both_signs(kind: str) -> None:
    x = values(kind)
    folded, direct = statistics(x).magnitudes, statistics(x.abs()).bins
    assert np.array_equal(folded.counts, direct.counts)
    assert np.array_equal(folded.upper, direct.upper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [2500], [100, 101, 4999]])
def test_the_fold_of_the_parts_is_the_whole(kind: str, cuts: list[int]) -> None:
    parts = [statistics(part) for part in torch.tensor_split(values(kind), cuts)]
    recorder = Recorder(MINMAX)
    for part in torch.tensor_split(values(kind), cuts):
        recorder.add(part)
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = merge(forwards, part)
    for part in reversed(parts[:-1]):
        backwards = merge(part, backwards)
    assert recorder.stats is not None
    assert same(forwards, recorder.stats)
    assert same(forwards, backwards)
    whole = statistics(values(kind))
    assert np.array_equal(forwards.keys, whole.keys)
    assert np.array_equal(forwards.counts, whole.counts)
    assert (forwards.low, forwards.high) == (whole.low, whole.high)


def test_statistics_cannot_be_changed() -> None:
    found = statistics(values("normal"))
    with pytest.raises(ValueError, match="read-only"):
        found.counts[0] = 1
    assert copy.deepcopy(found) is found


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_statistics(bad: float) -> None:
    x = values("normal")
    x[17] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        statistics(x)


@pytest.mark.parametrize("observer", list(RECORDED))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_layer_whose_output_is_not_finite_is_named(observer: str, bad: float) -> None:
    net = trained(Chain())
    with torch.no_grad():
        net.features[6].weight[3] = bad
    prepared = FLOWS[FlowName.fx].prepare(
        FLOWS[FlowName.fx].fuse(net, spec(), images()), spec(observer=RECORDED[observer]), images()
    )
    with pytest.raises(RunError, match=r"features\.6 holds NaN or infinity"):
        calibrate(prepared, [images()])


@pytest.mark.parametrize("observer", list(RECORDED))
def test_a_layer_is_named_though_later_images_are_fine_there(observer: str) -> None:
    net = trained(Chain())
    with torch.no_grad():
        net.features[0].weight *= 1e20
    prepared = FLOWS[FlowName.fx].prepare(
        FLOWS[FlowName.fx].fuse(net, spec(), images()), spec(observer=RECORDED[observer]), images()
    )
    with pytest.raises(RunError, match=r"features\.0 holds NaN or infinity"):
        calibrate(prepared, [images() * 1e20, images() * 1e-20])


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "largest"])
def test_minmax_and_moving_average_are_torchs_bit_for_bit(kind: str, bits: int, scheme: str) -> None:
    qscheme = torch.per_tensor_symmetric if scheme == "symmetric" else torch.per_tensor_affine
    grid = {} if bits == 8 else {"quant_min": 0, "quant_max": 2**bits - 1}
    qconfig = settings(activation_scheme=scheme, activation_bits=bits)
    for ours, theirs in (
        (activation_observer(qconfig, MINMAX)(), MinMaxObserver(qscheme=qscheme, **grid)),
        (
            activation_observer(qconfig, MOVING)(),
            MovingAverageMinMaxObserver(averaging_constant=MOVING.averaging_constant, qscheme=qscheme, **grid),
        ),
    ):
        for part in torch.tensor_split(values(kind, 2000), 7):
            assert ours(part) is part
            theirs(part)
        for mine, torchs in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
            assert mine.dtype is torchs.dtype
            assert torch.equal(mine, torchs)


def test_an_answer_follows_what_was_seen_since() -> None:
    observer = RecordingObserver(MINMAX)
    observer(torch.tensor([0.0, 1.0]))
    first = observer.calculate_qparams()[0]
    observer(torch.tensor([0.0, 2.0]))
    assert torch.equal(observer.calculate_qparams()[0], 2 * first)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[7] * 12, [200_000] * 3, [100_001, 20_000, 20_000, 3, 300_007, 20_000]])
def test_tensors_may_be_changed_as_soon_as_they_were_recorded(sizes: list[int], threads: int) -> None:
    parts = [values("after a ReLU", size, seed) - seed % 2 for seed, size in enumerate(sizes)]
    recorder = Recorder(MINMAX)
    with protocol.threads(threads), torch.inference_mode():
        for part in parts:
            recorder.add(changing := part.clone())
            changing.zero_()
    stats, exact = recorder.stats, torch.cat(parts)
    assert stats is not None
    assert [*stats.minima] == [float(part.min()) for part in parts]
    assert [*stats.maxima] == [float(part.max()) for part in parts]
    magnitudes = exact.abs().view(torch.int32).numpy() >> SHIFT
    keys, counts = np.unique(np.where(np.signbit(exact.numpy()), -magnitudes - 1, magnitudes), return_counts=True)
    assert np.array_equal(stats.keys, keys)
    assert np.array_equal(stats.counts, counts)


@pytest.mark.parametrize(("size", "most"), [(1000, 8_000), (30_000, 240_000), (100_000, 200_000), (200_000, 0)])
def test_what_waits_to_be_counted_does_not_grow_with_the_images(size: int, most: int) -> None:
    seen, part = StatisticsCollector(), values("normal", size)
    for _ in range(20):
        seen.add(part)
        assert (0 if seen._waiting is None else seen._waiting.numel()) <= most


def test_counters_never_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_collector, "_FULL", 3)
    seen, part = StatisticsCollector(), values("after a ReLU", 200_000)
    for _ in range(8):
        seen.add(part)
    assert seen._histogram is not None
    assert seen._histogram._before is not None
    seen._histogram._before *= 2**20  # as if the first six had been that many
    alone, several = statistics(part), seen.stats()
    assert np.array_equal(several.keys, alone.keys)
    assert np.array_equal(several.counts, (6 * 2**20 + 2) * alone.counts)


class InPlace(nn.Module):
    """A ReLU that overwrites what was observed before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def calibrated(net: nn.Module, flow: FlowName, qconfig: QConfig, observer: Observer, fusion: bool = True) -> Prepared:
    fused = FLOWS[flow].fuse(net, spec(fusion=fusion), images())
    prepared = FLOWS[flow].prepare(fused, spec(qconfig, observer), images())
    calibrate(prepared, images(24).split(8))
    return prepared


def test_values_before_an_operation_in_place_are_recorded() -> None:
    qconfig = settings(range_after_clamp=False)
    prepared = calibrated(trained(InPlace()), FlowName.eager, qconfig, MINMAX, fusion=False)
    observer = prepared.module.get_submodule("module.conv.activation_post_process")
    assert isinstance(observer, RecordingObserver)
    assert observer.recorder.stats is not None
    assert (observer.recorder.stats.keys < 0).any()


@pytest.mark.parametrize("observer", list(RECORDED))
@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_a_model_is_quantized_with_every_observer(flow: FlowName, observer: str) -> None:
    net = trained(Chain())
    prepared = calibrated(net, flow, settings(), RECORDED[observer])
    converted = FLOWS[flow].convert(prepared).module
    assert all(layer.int8 for layer in torch_layers.layers(converted, FLOWS[flow], Engine.x86))
    with quantize.engine(Engine.x86), torch.inference_mode():
        error = (converted(images()) - net(images())).norm() / net(images()).norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_statistics_are_those_of_the_activations_after_the_clamp(flow: FlowName) -> None:
    prepared = calibrated(trained(Chain(nn.ReLU6)), flow, settings(), MINMAX)
    clamped = [one.recorder.stats for one in observers(prepared.module).values() if one._forward_pre_hooks]
    assert clamped
    assert all(stats.low == 0 and stats.high <= 6 and (stats.keys >= 0).all() for stats in clamped)


# ------------------------------------------------------------------------------------------------ kept on disk


def pixels(batches: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return list(generator.integers(0, 256, (batches, 4, 3, 16, 16), dtype=np.uint8))


class Passes:
    """Calibrates through the folder and counts the images that went through the model."""

    def __init__(self, folder: Path, net: nn.Module | None = None) -> None:
        self.folder, self.images = folder, 0
        self.net = trained(Plain()) if net is None else net

    def run(
        self, batches: list[np.ndarray], observer: Observer = MINMAX, qconfig: QConfig | None = None, on: str = "a"
    ) -> Prepared:
        example = images(2)
        fused = FLOWS[FlowName.fx].fuse(self.net, spec(), example)
        prepared = FLOWS[FlowName.fx].prepare(fused, spec(qconfig or settings(), observer), example)

        def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.images += len(inputs[0])

        prepared.module.register_forward_pre_hook(count)
        cached.calibrate_once(prepared, batches, lambda batch: torch.from_numpy(batch) / 255, self.folder, on)
        return prepared


def seen(prepared: Prepared) -> list[TensorStats]:
    recorders = [o.recorder for o in observers(prepared.module).values() if isinstance(o, RecordingObserver)]
    return [recorder.stats for recorder in recorders if recorder.stats is not None]


def test_three_observers_on_the_same_images_make_one_pass(tmp_path: Path) -> None:
    passes, batches = Passes(tmp_path), pixels(3)
    first = passes.run(batches, MINMAX)
    second = passes.run(batches, RECORDED["percentile"], settings(activation_bits=4))
    third = passes.run(batches, RECORDED["mse"], settings(activation_scheme="symmetric"))
    assert passes.images == 12
    assert len(seen(first)) == len(seen(second)) == len(seen(third)) > 3
    for other in (second, third):
        assert all(same(*pair) for pair in zip(seen(first), seen(other), strict=True))


def test_a_longer_run_resumes_from_the_longest_kept_beginning(tmp_path: Path) -> None:
    passes, batches = Passes(tmp_path), pixels(32)
    for number in (2, 8, 32):
        resumed = passes.run(batches[:number], MOVING)
    assert passes.images == 32 * 4
    passes.run(batches[:16])
    assert passes.images == (32 + 8) * 4
    whole = Passes(tmp_path / "other").run(batches, MOVING)
    assert all(same(*pair) for pair in zip(seen(resumed), seen(whole), strict=True))
    first, second = torch_layers.read_qparams(resumed.module), torch_layers.read_qparams(whole.module)
    assert first.keys() == second.keys()
    for name, expected in second.items():
        assert np.array_equal(first[name].scale, expected.scale)
        assert np.array_equal(first[name].zero_point, expected.zero_point)


def test_other_images_another_clamp_or_another_model_are_never_taken_for_these(tmp_path: Path) -> None:
    passes, batches = Passes(tmp_path, trained(Chain(nn.ReLU6))), pixels(2)
    passes.run(batches)
    others = [
        {"batches": pixels(2, seed=1)},
        {"batches": [np.concatenate(batches)]},
        {"batches": batches[::-1]},
        {"batches": batches, "qconfig": settings(range_after_clamp=False)},
        {"batches": batches, "on": "b"},
    ]
    for number, other in enumerate(others, start=2):
        passes.run(**other)  # type: ignore[arg-type]
        assert passes.images == 8 * number


def test_a_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    passes, batches = Passes(tmp_path), pixels(2)
    first = seen(passes.run(batches))
    (entry,) = tmp_path.glob("*.npy")
    entry.write_bytes(entry.read_bytes()[:-1000])
    assert all(same(*pair) for pair in zip(first, seen(passes.run(batches)), strict=True))
    assert passes.images == 16


def test_what_is_packed_comes_back() -> None:
    stats = [statistics(values(kind)) for kind in KINDS]
    packed = cached.pack(stats)
    assert len(packed) == 6
    assert all(same(*pair) for pair in zip(stats, cached.unpack(packed), strict=True))
    assert cached.unpack(cached.pack([])) == []


def test_what_a_fused_module_of_torchs_gives_is_counted_once_and_is_two_batches_to_a_moving_average() -> None:
    net, batches = trained(architectures.tiny()), images(16).split(8)
    qconfig = settings()
    fused = FLOWS[FlowName.eager].fuse(net, spec(), batches[0])
    prepared = FLOWS[FlowName.eager].prepare(fused, spec(qconfig), batches[0])
    given: dict[str, list[Tensor]] = {}
    twice = {name for name, module in prepared.module.named_modules() if isinstance(module, nn.Sequential) and name}
    for name, module in prepared.module.named_modules():
        module.register_forward_hook(lambda m, i, output, name=name: given.setdefault(name, []).append(output.clone()))
    quantize.calibrate(prepared, batches)
    seen = {
        name: part.activation_post_process.recorder.stats
        for name, part in prepared.module.named_modules()
        if isinstance(getattr(part, "activation_post_process", None), RecordingObserver)
    }
    assert twice & set(seen)
    for name, stats in seen.items():
        if name in twice:
            assert stats.count == sum(output.numel() for output in given[name]), name
            assert [len(stats.minima), len(stats.maxima)] == [4, 4], name
            assert list(stats.maxima[::2]) == list(stats.maxima[1::2]) == [float(o.max()) for o in given[name]], name
