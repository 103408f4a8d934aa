"""One setting as a plain script: the steps of PyTorch's tutorial on static quantization, for ResNet-18.

    python -m benchmarks.script --data FOLDER --checkpoint FILE --granularity per_channel --batches 8

FOLDER has train/<class>/ and test/<class>/. Nothing is kept for the next setting, and nothing is done slowly on
purpose: images are decoded once, batches, threads and calibration images are qexp's, and timing takes as long as
`latency=quick`. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.ao.quantization import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    convert,
    prepare,
)

from qexp.system.torchvision_import import (
    torchvision,  # torchvision itself, also beside a torch that it wasn't built for
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATION_BATCH, CALIBRATION_BATCH, THREADS = 32, 16, 2
WARMUP_CALLS, BLOCK_SECONDS, TIMING_SECONDS, TIMED_IMAGES = 5, 0.01, 1.0, 64


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--granularity", choices=("per_tensor", "per_channel"), default="per_channel")
    parser.add_argument("--activation", choices=("asymmetric", "symmetric"), default="asymmetric")
    parser.add_argument("--observer", choices=("minmax", "moving_average"), default="minmax")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images")
    return parser.parse_args()


def normalised(pixels: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each to float32 [n, 3, H, W], contiguous as torchvision's ToTensor returns them.

    (In channels-last FP32 convolutions add up in another order, and ranges differ in their last bits.)
    """
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div(255)
    return (images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def decoded(samples: list[tuple[str, int]]) -> Tensor:
    pixels = []
    for path, _ in samples:
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB")))
    return normalised(pixels)


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.split(EVALUATION_BATCH)])
    return float((logits.argmax(1) == labels).float().mean())


def qconfig(asked: argparse.Namespace) -> QConfig:
    """A qconfig with 7 bits for activations, as torch's own reduce_range has on x86."""
    symmetric = asked.activation == "symmetric"
    observer = {"minmax": MinMaxObserver, "moving_average": MovingAverageMinMaxObserver}[asked.observer]
    activation = observer.with_args(
        dtype=torch.quint8,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        quant_min=0,
        quant_max=127,
    )
    if asked.granularity == "per_channel":
        weight = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    else:
        weight = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    return QConfig(activation=activation, weight=weight)


def scripted(model: nn.Module, image: Tensor, path: Path) -> nn.Module:
    """The model, traced, frozen, saved and loaded back."""
    torch.jit.save(torch.jit.freeze(torch.jit.trace(model, image)), path)
    return torch.jit.load(path)


def milliseconds(variants: dict[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, float]:
    """The median time of each, timed alternately in blocks."""
    batches = images.split(1)
    calls: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for model in variants.values():
            for batch in batches[:WARMUP_CALLS]:
                model(batch)
        end = time.perf_counter() + TIMING_SECONDS
        while time.perf_counter() < end:
            for name, model in variants.items():
                block = time.perf_counter() + BLOCK_SECONDS
                while time.perf_counter() < block:
                    batch = batches[len(calls[name]) % len(batches)]
                    start = time.perf_counter()
                    model(batch)
                    calls[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in calls.items()}


def main() -> None:
    asked = options()
    torch.backends.quantized.engine = "x86"
    torch.set_num_threads(THREADS)
    steps: dict[str, float] = {}
    last = time.perf_counter()

    def step(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        steps[name], last = round(now - last, 3), now

    test, train = (torchvision.datasets.ImageFolder(str(asked.data / split)) for split in ("test", "train"))
    images, labels = decoded(test.samples), torch.tensor(test.targets)
    chosen = np.random.default_rng(asked.seed).permutation(len(train))[: asked.batches * CALIBRATION_BATCH]
    calibration = decoded([train.samples[index] for index in chosen])
    step("decoding")
    model = torchvision.models.quantization.resnet18(weights=None, num_classes=len(test.classes), quantize=False)
    model.load_state_dict(torch.load(asked.checkpoint, weights_only=True))
    model.eval()
    model.fuse_model(is_qat=False)
    step("model")
    result: dict[str, object] = {"fp32": accuracy(model, images, labels)}
    step("FP32 evaluation")
    model.qconfig = qconfig(asked)
    prepared = prepare(model)
    with torch.inference_mode():
        for batch in calibration.split(CALIBRATION_BATCH):
            prepared(batch)
    int8 = convert(prepared)
    step("calibration")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(int8.state_dict(), Path(folder) / "int8.pt")
        variants: dict[str, Callable[[Tensor], Tensor]] = {
            "fp32_eager": model,
            "fp32_torchscript": scripted(model, images[:2], Path(folder) / "fp32.ts"),
            "int8_eager": int8,
            "int8_torchscript": scripted(int8, images[:2], Path(folder) / "int8.ts"),
        }
    step("saving")
    result["int8"] = accuracy(int8, images, labels)
    step("INT8 evaluation")
    torch.set_num_threads(1)
    result["milliseconds"] = milliseconds(variants, images[:TIMED_IMAGES])
    step("timing")
    print(json.dumps({**result, "steps": steps}))


if __name__ == "__main__":
    main()
