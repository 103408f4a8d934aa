"""Training of the float model, for those who bring none: a plain loop, the same on a CPU and on a GPU.

Sets the number of threads and the seed that it depends on, and leaves both as they were.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from qexp.config import schema
from qexp.data.loading import Data, normalise
from qexp.errors import InputError, NotFinite, RunError
from qexp.models import inference
from qexp.system import machine_lock

log = logging.getLogger(__name__)

_WARM_UP = 0.25  # share of a one-cycle schedule in which the learning rate rises


@dataclass(frozen=True)
class Trained:
    """The last epoch's mean loss and accuracy on the (augmented) training images, and what it took."""

    loss: float
    accuracy: float
    seconds: float
    device: str


def train(module: nn.Module, settings: schema.Train, data: Data, threads: int) -> Trained:
    """Trains `module` in place on `data.train` and leaves it in eval mode on the CPU.

    On a CPU the result depends on the settings, the data and the number of threads alone. A GPU works in mixed
    precision and channels-last, and is not deterministic.
    Raises InputError for a device that is not there, RunError where memory runs out, NotFinite where the loss or a
    weight is not finite; it names the image if the untrained model answers some image so.
    """
    device = choose_device(settings.device)
    start = time.perf_counter()
    untrained = copy.deepcopy(module.state_dict())
    with _globals(settings.seed, threads, device):
        try:
            loss, accuracy = _train(module, settings, data, device)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"train.batch_size={settings.batch_size} does not fit into the memory of {device}; use a smaller one."
            ) from error
        except NotFinite:
            module.to("cpu").load_state_dict(untrained)
            module.eval()
            title = "before training, in which the loss became NaN or infinite"
            inference.predict(module, data.train, data.mean, data.std, settings.batch_size, title)
            raise
        finally:
            module.to("cpu")
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            module.eval()
    result = Trained(loss, accuracy, time.perf_counter() - start, device.type)
    log.info(
        "trained %d epochs on %d images in %.0f s on %s: loss %.3f, training accuracy %.3f",
        settings.epochs, len(data.train.labels), result.seconds, device.type, loss, accuracy,
    )  # fmt: skip
    return result


def choose_device(asked: schema.Device) -> torch.device:
    """`auto` is CUDA where there is a GPU. Raises InputError for `cuda` where there is none."""
    available = torch.cuda.is_available()
    if asked == schema.Device.cuda and not available:
        raise InputError("train.device=cuda: torch finds no CUDA device; use train.device=auto or cpu.")
    return torch.device("cuda" if available and asked != schema.Device.cpu else "cpu")


def lr_factor(schedule: schema.Schedule, step: int, steps: int) -> float:
    """Share of the learning rate at `step` of `steps` (from 0), in (0, 1].

    cosine: half a cosine from 1 to 0 (Loshchilov and Hutter 2017, without restarts). onecycle: a line up for the
    first quarter, then half a cosine (after Smith and Topin 2018).
    """
    done = (step + 0.5) / steps
    if schedule == schema.Schedule.constant:
        return 1.0
    if schedule == schema.Schedule.cosine:
        return 0.5 * (1 + math.cos(math.pi * done))
    if done < _WARM_UP:
        return done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def augmented(images: Tensor, augment: schema.Augment, generator: torch.Generator) -> Tensor:
    """Images [n, 3, H, W], each mirrored with probability 1/2 and shifted within a border of zeros (He et al. 2015)."""
    n, channels, height, width = images.shape
    if augment.flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if augment.crop_padding > 0:
        padding = augment.crop_padding
        offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(images.device)
        rows = offsets[0, :, None] + torch.arange(height, device=images.device)
        columns = offsets[1, :, None] + torch.arange(width, device=images.device)
        image = torch.arange(n, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        images = F.pad(images, (padding,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return images


def _train(module: nn.Module, settings: schema.Train, data: Data, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy of the last epoch."""
    on_gpu = device.type == "cuda"
    module.to(device)
    if on_gpu:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.requires_grad_(True).train()
    optimizer = _optimizer(module, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    n = len(data.train.labels)
    data.train.pixels()  # decoded and kept as a whole; each epoch needs all of it
    steps = settings.epochs * math.ceil(n / settings.batch_size)
    done = 0
    loss = accuracy = math.nan
    with tqdm(total=steps, desc="training", unit="batch", disable=None, leave=False) as bar:
        for epoch in range(1, settings.epochs + 1):
            # Summed on the device: reading a number from a GPU after every batch would stall it.
            sums = torch.zeros(2, device=device)
            for images, labels in _batches(data, settings, generator, device):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * lr_factor(settings.schedule, done, steps)
                with machine_lock.computing():
                    sums += _step(module, optimizer, images, labels, settings.label_smoothing)
                done += 1
                bar.update()
            loss, accuracy = (sums / n).tolist()
            bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
            if not math.isfinite(loss):
                raise NotFinite(
                    f"train.lr={settings.lr}: the loss became {loss} in epoch {epoch} of {settings.epochs};"
                    " use a smaller train.lr."
                )
    # The last step's weights are in no loss.
    broken = [name for name, value in module.named_parameters() if not value.isfinite().all()]
    if broken:
        raise NotFinite(
            f"train.lr={settings.lr}: {broken[0]} became NaN or infinite in epoch {settings.epochs} of"
            f" {settings.epochs}; use a smaller train.lr."
        )
    return loss, accuracy


def _step(
    module: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, smoothing: float
) -> Tensor:
    """One update of the weights -> [sum of the losses, number of correct predictions]."""
    # bfloat16 has the range of float32, so that no gradients need be scaled.
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
        output = module(images)
        # In training, nets with auxiliary heads return theirs behind the logits.
        logits = output[0] if isinstance(output, tuple) else output
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return torch.stack([loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()])


def _batches(
    data: Data, settings: schema.Train, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """All training images once, in random order, augmented: float32 [n, 3, H, W] and int64 [n], on the device."""
    labels = data.train.labels
    order = torch.randperm(len(labels), generator=generator).numpy()
    # Of equal size, give or take one: BatchNorm can't be trained on a last batch of a single image.
    for indices in np.array_split(order, math.ceil(len(labels) / settings.batch_size)):
        images = normalise(data.train.pixels(indices), data.mean, data.std).to(device)
        yield augmented(images, settings.augment, generator), torch.from_numpy(labels[indices]).to(device)


def _optimizer(module: nn.Module, settings: schema.Train) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    decay = settings.weight_decay
    match settings.optimizer:
        case schema.Optimizer.sgd:
            momentum = settings.momentum
            return torch.optim.SGD(
                parameters, settings.lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0
            )
        case schema.Optimizer.adam:
            return torch.optim.Adam(parameters, settings.lr, weight_decay=decay)
        case schema.Optimizer.adamw:
            return torch.optim.AdamW(parameters, settings.lr, weight_decay=decay)


@contextlib.contextmanager
def _globals(seed: int, threads: int, device: torch.device) -> Iterator[None]:
    """Random state and number of threads, put back at the end; gradients on."""
    before = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
