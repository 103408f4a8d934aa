"""The float model's training: schedule, augmentation, determinism, and what it refuses."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from qexp.config import schema
from qexp.data.loading import Data, load_data, normalise
from qexp.errors import InputError, RunError
from qexp.models import architectures
from qexp.models.training import augmented, choose_device, lr_factor, train
from tests.helpers import ROOT

CONF = ROOT / "conf"


def settings(name: str = "fast", **changes: Any) -> schema.Train:
    values = yaml.safe_load((CONF / "train" / f"{name}.yaml").read_text())
    values |= {
        "augment": schema.Augment(**values["augment"]),
        "optimizer": schema.Optimizer(values["optimizer"]),
        "schedule": schema.Schedule(values["schedule"]),
        "device": schema.Device(values["device"]),
    }
    return dataclasses.replace(schema.Train(**values), **changes)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The digits at 8x8, for speed."""
    spec = yaml.safe_load((CONF / "dataset" / "digits.yaml").read_text())
    return load_data({**spec, "resize": 8, "image_size": 8}, tmp_path_factory.mktemp("cache"))


def fresh(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return architectures.tiny(num_classes=10)


def accuracy(module: nn.Module, data: Data) -> float:
    with torch.no_grad():
        logits = module(normalise(data.test.pixels(), data.mean, data.std))
    return float((logits.argmax(1).numpy() == data.test.labels).mean())


@pytest.mark.parametrize("schedule", list(schema.Schedule))
def test_every_schedule_stays_within_one_and_averages_what_it_should(schedule: schema.Schedule) -> None:
    factors = [lr_factor(schedule, step, 1000) for step in range(1000)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1, abs=0.01)
    assert np.mean(factors) == pytest.approx(1.0 if schedule == schema.Schedule.constant else 0.5, abs=1e-3)


def test_one_cycle_peaks_after_a_quarter_and_one_step_is_enough() -> None:
    factors = [lr_factor(schema.Schedule.onecycle, step, 100) for step in range(100)]
    assert abs(int(np.argmax(factors)) - 25) <= 1
    assert lr_factor(schema.Schedule.onecycle, 0, 1) > 0


def test_a_crop_is_a_shift_of_the_image_within_zeros() -> None:
    images = torch.arange(1, 2 * 3 * 5 * 4 + 1, dtype=torch.float32).view(2, 3, 5, 4)
    crops = augmented(images, schema.Augment(flip=False, crop_padding=2), torch.Generator().manual_seed(3))
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    for image, crop in zip(padded, crops, strict=True):
        shifts = [image[:, y : y + 5, x : x + 4] for y in range(5) for x in range(5)]
        assert sum(torch.equal(crop, shift) for shift in shifts) == 1


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.rand(400, 3, 2, 3)
    flipped = augmented(images, schema.Augment(flip=True, crop_padding=0), torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(images, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 160 < sum(mirrored) < 240


@pytest.mark.slow
def test_training_learns_and_is_the_same_twice_and_leaves_globals_alone(
    digits: Data, caplog: pytest.LogCaptureFixture
) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first, second, other = fresh(), fresh(), fresh()
    with caplog.at_level(logging.INFO):
        train(first, settings(epochs=8, lr=0.05), digits, threads=1)
    torch.manual_seed(99)  # must not matter
    train(second, settings(epochs=8, lr=0.05), digits, threads=1)
    train(other, settings(epochs=8, lr=0.05, seed=1), digits, threads=1)
    torch.set_rng_state(state)
    assert torch.get_num_threads() == threads
    assert accuracy(first, digits) > 0.9
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert not any(module.training for module in first.modules())
    assert [r.message for r in caplog.records if r.message.startswith("trained 8 epochs on 898 images")]


def test_training_leaves_the_random_state_of_its_caller(digits: Data) -> None:
    state = torch.get_rng_state()
    train(fresh(), settings(), digits, threads=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", list(schema.Optimizer))
def test_every_optimizer_lowers_the_loss(digits: Data, optimizer: schema.Optimizer) -> None:
    result = train(fresh(), settings(epochs=2, lr=0.01, optimizer=optimizer, label_smoothing=0.1), digits, threads=1)
    assert result.loss < 2.25  # ln(10) = 2.303 is chance


@pytest.mark.parametrize("batch_size", [897, 100_000])
def test_a_last_batch_of_one_image_or_one_larger_than_the_data_is_no_problem(digits: Data, batch_size: int) -> None:
    assert np.isfinite(train(fresh(), settings(batch_size=batch_size), digits, threads=1).loss)


def test_a_loss_that_is_not_finite_names_the_learning_rate(digits: Data) -> None:
    with pytest.raises(RunError, match=r"train\.lr=1e\+20: the loss became (nan|inf) in epoch \d of 3; use a smaller"):
        train(fresh(), settings(lr=1e20, epochs=3), digits, threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_refused_and_auto_is_the_cpu() -> None:
    assert choose_device(schema.Device.auto).type == "cpu"
    with pytest.raises(InputError, match=r"train\.device=cuda"):
        choose_device(schema.Device.cuda)


class Auxiliary(nn.Module):
    """Returns a second head while training, as Inception nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = architectures.tiny(num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = self.net(x)
        return (logits, logits * 0) if self.training else logits


def test_auxiliary_heads_are_left_out_of_the_loss(digits: Data) -> None:
    assert train(Auxiliary(), settings(epochs=4, lr=0.05), digits, threads=1).loss < 2.0


@pytest.mark.slow
def test_the_default_recipe_reaches_097_on_digits(tmp_path: Path) -> None:
    data = load_data(yaml.safe_load((CONF / "dataset" / "digits.yaml").read_text()), tmp_path)
    torch.manual_seed(0)
    module = architectures.resnet18(num_classes=10)
    train(module, settings("default", device=schema.Device.cpu), data, threads=2)
    assert accuracy(module, data) >= 0.97
