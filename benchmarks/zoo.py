"""64 architectures of timm through the flows that trace a model: how far INT8 logits are from FP32's, in each runtime.

    pip install 'qexp[zoo]'
    make bench BENCH=zoo
    QEXP_BENCH_ZOO="resnet50d swin_tiny_patch4_window7_224" make bench BENCH=zoo     # some of them
    QEXP_BENCH_ZOO_RUNTIMES="" make bench BENCH=zoo                                 # Q/DQ programs alone, in float

Weights are random, where timm begins with zeros, too: behind a BatchNorm or a head of zeros nothing would be measured.
BatchNorm's statistics, calibration and evaluation are from crops of scikit-learn's two photographs: what is compared is
which networks each flow takes, and what its places to quantize cost. The results of a network are kept in a file, so
that a benchmark that was stopped goes on, and more runtimes are added to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from benchmarks.size import sized
from benchmarks.speed import composed
from qexp import quantize
from qexp.config.schema import FlowName, Placement, RuntimeName
from qexp.errors import QexpError, one_line
from qexp.models import architectures, float_model
from qexp.quantize import FLOWS, QuantizationSpec, QuantizedModel, qdq
from qexp.records import Precision
from qexp.runtimes import RUNTIMES
from qexp.runtimes.parting import MOST, times_rounding
from qexp.statistics import decibels

ZOO = """
    resnet50d resnext50_32x4d seresnet50 ecaresnet26t skresnet18 res2net50_14w_8s densenet121 vgg11_bn
    inception_v3 xception41 dla34 hrnet_w18_small efficientnet_b0 tf_efficientnet_b0 tf_efficientnet_lite0
    efficientnetv2_rw_t mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small mnasnet_100 fbnetc_100
    regnetx_002 regnety_002 rexnet_100 ghostnet_100 repghostnet_050 repvgg_a0 mobileone_s0 lcnet_050 tinynet_e
    cspresnet50 cspdarknet53 gernet_s nf_resnet50 dm_nfnet_f0 convnext_atto convnextv2_atto inception_next_tiny
    starnet_s1 fastvit_t8 efficientformer_l1 poolformer_s12 edgenext_xx_small mobilevit_xxs mobilevitv2_050
    levit_128s vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 mixer_s32_224
    resmlp_12_224 convmixer_768_32 crossvit_tiny_240 pit_ti_224 coat_tiny botnet26t_256 halonet26t pvt_v2_b0
    focalnet_tiny_srf selecsls42b vovnet39a hardcorenas_a spnasnet_100 semnasnet_100
"""  # fmt: skip
NAMED = "QEXP_BENCH_ZOO"
NETWORKS = sized(tuple(ZOO.split()), ("tiny",))
SIZE = sized(None, 32)  # of images, None: the network's own
WAYS = ((FlowName.fx, Placement.every_op), (FlowName.pt2e, Placement.every_op), (FlowName.pt2e, Placement.layers))
TORCHAO = "torchao's layers"
BY = "QEXP_BENCH_ZOO_RUNTIMES"
IMAGES = 4  # for calibration, and as many others for evaluation
ROOT = Path(__file__).resolve().parent.parent


def zoo(outputs: str) -> None:
    """Print a row for each network, and the sentences of refusals."""
    if SIZE is None and importlib.util.find_spec("timm") is None:
        print("it needs the package timm: pip install 'qexp[zoo]'")
        return
    folder = sized(ROOT / "outputs" / "benchmarks", Path(outputs)) / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    ways = [f"{flow} {placement}" for flow, placement in WAYS if not flow.missing]
    for flow in dict.fromkeys(flow for flow, _ in WAYS):
        if flow.missing:
            print(f"flow={flow} is left out: it needs {flow.missing[0]}")
    ways += [TORCHAO] * (not FlowName.pt2e.missing)
    runtimes = executed_by()
    print("SQNR of the Q/DQ program's logits against FP32, dB", end="")
    print(f" / difference of {' / '.join(runtimes)} from it, over its own from FP32's" if runtimes else "")
    print(" | ".join(["network", *ways]))
    found = {}
    for name in os.environ.get(NAMED, "").split() or NETWORKS:
        found[name] = _once(name, folder, runtimes)
        print(" | ".join([name, *(_cell(found[name][way], runtimes) for way in ways)]), flush=True)
    _summarise(found, ways)
    for name, one in found.items():
        for way in ways:
            for sentence in (one[way]["refused"], *one[way]["runtimes_refused"]):
                if sentence:
                    print(f"{name}, {way}: {sentence}")


def executed_by() -> list[RuntimeName]:
    """The runtimes asked for by the environment that are installed."""
    asked = [RuntimeName(name) for name in os.environ.get(BY, "onnxruntime openvino").split()]
    return [name for name in asked if not RUNTIMES[name].unavailable()]


def _cell(result: dict[str, Any], runtimes: list[RuntimeName]) -> str:
    if result["refused"]:
        return "refused"
    times = result["times_rounding"]
    marked = {name: f"{value:.2f}{'!' * (value > MOST)}" for name, value in times.items()}
    return " / ".join([f"{result['sqnr_db']:.1f}", *(marked.get(name, "–") for name in runtimes)])


def _summarise(found: dict[str, Any], ways: list[str]) -> None:
    """Print for each way how many networks it takes, and its programs' SQNR, also beside the first and last way's."""
    of_way = {way: {name: one[way]["sqnr_db"] for name, one in found.items() if not one[way]["refused"]}
              for way in ways}  # fmt: skip
    for way, sqnr in of_way.items():
        print(f"{way}: {len(sqnr)} of {len(found)} networks, {_quartiles(list(sqnr.values()))} dB", end="")
        for other in dict.fromkeys((ways[0], ways[-1])):
            both = sqnr.keys() & of_way[other].keys()
            beside = [sqnr[name] - of_way[other][name] for name in both]
            print(f"; beside {other} in {len(both)}: {_quartiles(beside)} dB" * (other != way), end="")
        print()


def _quartiles(values: list[float]) -> str:
    """Least, quartiles and greatest."""
    return ", ".join(f"{one:.1f}" for one in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))) if values else "–"


def _once(name: str, folder: Path, runtimes: list[RuntimeName]) -> dict[str, Any]:
    """The results of one network by flow and placement, from the file that has them, or measured and written there."""
    path = folder / f"{name}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    asked = [(flow, placement) for flow, placement in WAYS if not flow.missing]
    left = {way: _untried(kept.get(" ".join(way)), runtimes) for way in asked}
    torchao = not FlowName.pt2e.missing and TORCHAO not in kept
    if torchao or any(one is not None for one in left.values()):
        net, images = network(name)
        if torchao:
            kept[TORCHAO] = by_torchao(net, images)
        for way, untried in left.items():
            if untried is not None:
                kept[" ".join(way)] = _joined(kept.get(" ".join(way)), result(net, *way, images, untried))
                path.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def _untried(kept: dict[str, Any] | None, runtimes: list[RuntimeName]) -> list[RuntimeName] | None:
    """The runtimes that are still to execute what a flow makes of a network; None if nothing is left to do."""
    if kept is None:
        return runtimes
    return [name for name in runtimes if name not in kept["tried"] and not kept["refused"]] or None


def _joined(kept: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """A result with those of more runtimes."""
    if kept is None:
        return more
    lists = {key: kept[key] + more[key] for key in ("tried", "runtimes_refused")}
    return kept | lists | {key: kept[key] | more[key] for key in ("layers", "times_rounding")}


def network(name: str, size: int | None = None) -> tuple[nn.Module, Tensor]:
    """A network with the statistics of photographs, and these: IMAGES for calibration, and as many for evaluation.

    size: of the images, its own if None.
    """
    torch.manual_seed(0)
    net, own = _built(name)
    images = photographs(2 * IMAGES, size or own)
    float_model.with_statistics(net, images[:IMAGES])
    return net.eval().requires_grad_(False), images


def _built(name: str) -> tuple[nn.Module, int]:
    if SIZE is not None:
        return architectures.tiny(num_classes=10), SIZE
    importlib.import_module("qexp.system.torchvision_import")  # timm imports torchvision
    timm: Any = importlib.import_module("timm")
    net = timm.create_model(name, pretrained=False)
    _without_zeros(net)
    return net, net.pretrained_cfg["input_size"][-1]


def _without_zeros(net: nn.Module) -> None:
    """Draw what is zero throughout, biases aside, in place: matrices as timm draws others, gains from 0.2 to 0.6."""
    for name, parameter in net.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            with torch.no_grad():
                parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.uniform_(0.2, 0.6)


def photographs(count: int, size: int) -> Tensor:
    """Crops of two photographs, at many scales, normalised: float32 [count, 3, size, size]."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(count):
        photo = load_sample_images().images[number % 2]
        side = int(generator.integers(size // 2, min(photo.shape[:2])))
        top, left = (int(generator.integers(0, whole - side + 1)) for whole in photo.shape[:2])
        crop = torch.from_numpy(photo[top : top + side, left : left + side].copy()).permute(2, 0, 1).float() / 255
        made.append(nn.functional.interpolate(crop[None], size, mode="bilinear", antialias=True)[0])
    return (torch.stack(made) - 0.45) / 0.225


def result(
    net: nn.Module, flow: FlowName, placement: Placement, images: Tensor, runtimes: list[RuntimeName]
) -> dict[str, Any]:
    """The SQNR of the program's logits, its layers in INT8, how far runtimes part from it, and refusals.

    What runtimes execute has 7-bit weights, so that no CPU's sums saturate, and is compared with its own program.
    """
    found: dict[str, Any] = {"refused": "", "tried": list(runtimes), "runtimes_refused": []}
    found |= {"sqnr_db": None, "layers": {}, "times_rounding": {}}
    calibration, batch = images[:IMAGES], images[IMAGES:]
    try:
        int8 = _quantized(net, flow, _spec(flow, placement, "none"), calibration)
        guarded = _quantized(net, flow, _spec(flow, placement, "weights"), calibration) if runtimes else int8
    except Exception as error:  # in a run, a model that torch can't quantize is refused with the reason
        refused = one_line(error) if isinstance(error, QexpError) else ""
        return found | {"refused": refused or _sentence(net, flow, _spec(flow, placement, "none"), images[:1])}
    fp32, exact = _answers(net, int8, batch)
    found |= {"sqnr_db": _sqnr(fp32, exact)}
    found["layers"]["program"] = sum(layer.int8 for layer in int8.layers), len(int8.layers)
    fp32, exact = _answers(net, guarded, batch) if runtimes else (fp32, exact)
    with tempfile.TemporaryDirectory() as folder:
        for name in runtimes:
            runtime = RUNTIMES[name]
            path = Path(folder) / runtime.file(Precision.int8)
            try:
                with quantize.engine(guarded.engine):
                    if not path.exists():
                        runtime.export(guarded.module, batch, path)
                logits = runtime.load(path, lambda: net, None)(batch).numpy()
            except QexpError as error:
                found["runtimes_refused"].append(one_line(error))
                continue
            found["times_rounding"][name] = times_rounding(fp32, exact, logits)
            found["layers"][name] = runtime.layers(path, batch.shape)
    return found


def by_torchao(net: nn.Module, images: Tensor) -> dict[str, Any]:
    """The SQNR of what torchao's own quantizer for x86 makes, with the same grids and observers, or its refusal."""
    importlib.import_module("qexp.quantize.torchao_backend")  # which imports torchao without its words on GPUs
    from torchao.quantization.pt2e import observer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec as Spec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

    activation = Spec(torch.uint8, observer.MinMaxObserver, qscheme=torch.per_tensor_affine)
    weight = Spec(torch.int8, observer.PerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0)
    quantizer = X86InductorQuantizer().set_global(QuantizationConfig(activation, None, weight, None))
    calibration, batch = images[:IMAGES], images[IMAGES:]
    found: dict[str, Any] = {"tried": [], "runtimes_refused": [], "times_rounding": {}, "layers": {}}
    try:
        with torch.no_grad():
            prepared = prepare_pt2e(
                torch.export.export(net, (calibration,), strict=True).module(check_guards=False), quantizer
            )
            prepared(calibration)
            sqnr = _sqnr(net(batch).numpy(), convert_pt2e(prepared)(batch).numpy())
    except Exception as error:  # of any kind: its quantizer fails with bare assertions, too
        return found | {"refused": one_line(error) or type(error).__name__, "sqnr_db": None}
    return found | {"refused": "", "sqnr_db": sqnr}


def _spec(flow: FlowName, placement: Placement, overflow: str) -> QuantizationSpec:
    settings = (f"flow={flow}", f"qconfig.placement={placement}", f"qconfig.overflow={overflow}", "engine=onednn")
    config = composed("outputs", *settings)
    return QuantizationSpec(config.qconfig, config.observer, config.engine)


def _answers(net: nn.Module, int8: QuantizedModel, batch: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the float model, and of the Q/DQ program in float."""
    with torch.inference_mode(), quantize.engine(int8.engine):
        return net(batch).numpy(), qdq.program(int8.module, batch)(batch).numpy()


_FUSED: dict[FlowName, tuple[nn.Module, nn.Module]] = {}
"""The last network that a flow fused, and what came out, which is the same with either placement."""


def _quantized(net: nn.Module, flow: FlowName, spec: QuantizationSpec, images: Tensor) -> QuantizedModel:
    if flow not in _FUSED or _FUSED[flow][0] is not net:
        _FUSED[flow] = net, FLOWS[flow].fuse(net, spec, images)
    prepared = FLOWS[flow].prepare(_FUSED[flow][1], spec, images)
    quantize.calibrate(prepared, images.split(8))
    int8 = FLOWS[flow].convert(prepared)
    quantize.check_layers(int8, images[:2])
    return int8


def _sentence(net: nn.Module, flow: FlowName, spec: QuantizationSpec, image: Tensor) -> str:
    """The sentence with which a run refuses the network."""
    try:
        quantize.dry_run(net, FLOWS[flow], spec, image)
    except QexpError as error:
        return one_line(error)
    return "only a check on one image takes it"


def _sqnr(expected: np.ndarray, actual: np.ndarray) -> float:
    signal, noise = (float(np.square(one, dtype=np.float64).sum()) for one in (expected, actual - expected))
    return decibels(signal, noise)
