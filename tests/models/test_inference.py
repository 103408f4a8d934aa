"""Logits that are NaN or infinite are no answer: the image that has them is named, wherever they turn up first."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.config.schema import Config
from qexp.data.builtin import ArrayDataset
from qexp.data.loading import Data, load_data
from qexp.errors import NotFinite
from qexp.metrics import Metric
from qexp.models import inference, training
from qexp.pipeline import input_checks, run
from qexp.records import Predictions

Composed = Callable[..., Config]


def make(split: str, dark: tuple[int, ...] = (), dark_in_training: int | None = None) -> ArrayDataset:
    """300 random images to evaluate on and 64 to train on; those at `dark` (or the one to train on) are black."""
    rng = np.random.default_rng(split == "test")
    images = rng.integers(1, 256, (300 if split == "test" else 64, 8, 8), dtype=np.uint8)
    images[list(dark) if split == "test" else [dark_in_training] if dark_in_training is not None else []] = 0
    return ArrayDataset(images, np.arange(len(images)) % 4, "abcd", f"{dark} {dark_in_training}")


class Net(nn.Module):
    """Finite for every image."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


class Logarithm(Net):
    """NaN for black images: the logarithm of 0, times 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * x.sum((1, 2, 3)).log()[:, None]


class Squeezed(Net):
    """Gives [classes] for one image, not [1, classes]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class Quotient(Net):
    """Infinite in INT8 alone, for black images: a thousandth is 0 on a grid that reaches to 1 and beyond."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.conv.weight, 0.1)
        nn.init.constant_(self.conv.bias, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        return self.fc(y.mean((2, 3))) / y.amax((1, 2, 3))[:, None]


@pytest.fixture
def job(composed: Composed, tmp_path: Path) -> Callable[..., Config]:
    """job(net, *overrides) -> the configuration of a run of it, whose black images are `dark`."""

    def configured(net: str, dark: tuple[int, ...], *overrides: str) -> Config:
        torch.save(globals()[net]().state_dict(), tmp_path / "net.pt")
        (tmp_path / "run").mkdir(exist_ok=True)
        return composed(
            "model=custom", f"model._target_={__name__}.{net}", f"model.checkpoint={tmp_path}/net.pt", "flow=fx",
            "dataset=custom", f"dataset._target_={__name__}.make", f"+dataset.dark={list(dark)}", "latency=off",
            "dataset.mean=[0]", "dataset.std=[1]", "calib.batches=2", *overrides,
        )  # fmt: skip

    return configured


def refusal(config: Config, folder: Path) -> str:
    input_checks.check_inputs([config])
    with pytest.raises(NotFinite) as caught:
        run.run_experiment(config, folder)
    assert not re.search("ReLU|fuse", str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("flow", ["fx", "dynamic"])
def test_a_model_that_squeezes_its_logits_can_be_evaluated_image_by_image(
    job: Callable[..., Config], tmp_path: Path, flow: str
) -> None:
    def found(net: str, size: int) -> dict[str, float]:
        config = job(net, (), f"flow={flow}", f"evaluate.batch_size={size}", f"calib.batch_size={size}")
        input_checks.check_inputs([config])
        return run.run_experiment(config, tmp_path / "run").metrics

    right, squeezed = found("Net", 20), found("Squeezed", 1)
    assert squeezed[Metric.accuracy_fp32] == right[Metric.accuracy_fp32]
    assert abs(squeezed[Metric.accuracy_int8] - right[Metric.accuracy_int8]) < 0.1


@pytest.mark.parametrize("dark", [(3, 290), (290,)])
def test_an_fp32_model_that_gives_nan_fails_the_run_and_names_the_image(
    job: Callable[..., Config], tmp_path: Path, dark: tuple[int, ...]
) -> None:
    said = refusal(job("Logarithm", dark), tmp_path / "run")
    # Of the first 256 images all that is needed to compare the fused model with the float model.
    assert (
        f"evaluating FP32: the model gives NaN or infinity as logits of 1 of {256 if 3 in dark else 300} images" in said
    )
    assert f"the first of them image {dark[0]} of dataset make (test);" in said


def test_an_int8_model_that_gives_infinity_fails_the_run_however_often(
    job: Callable[..., Config], tmp_path: Path
) -> None:
    config = job("Quotient", (280, 290))
    for _ in range(2):  # the second finds FP32 in the cache
        said = refusal(config, tmp_path / "run")
        assert "evaluating INT8: the model gives NaN or infinity as logits of 2 of 300 images" in said
        assert "the first of them image 280 of dataset make (test);" in said


def test_what_a_cache_or_a_runtime_hands_over_is_looked_at_too(job: Callable[..., Config], tmp_path: Path) -> None:
    data = data_of(job("Net", ()), tmp_path)
    logits = np.zeros((5, 4), np.float32)
    found = inference.predictions(logits, data.test, "reading", np.arange(7, 12))
    assert found.image_ids == ("7", "8", "9", "10", "11")
    assert found.labels.tolist() == [3, 0, 1, 2, 3]
    for value in (np.nan, np.inf, -np.inf):
        logits[2, 1] = value
        with pytest.raises(NotFinite, match=r"reading: .* 1 of 5 images, .* image 9 of dataset make \(test\)"):
            inference.predictions(logits, data.test, "reading", np.arange(7, 12))
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            Predictions(logits, found.labels, found.image_ids)


def data_of(config: Config, folder: Path) -> Data:
    return load_data(config.dataset, folder / "cache")


def test_training_that_diverges_names_the_image_only_where_it_is_one(
    job: Callable[..., Config], tmp_path: Path
) -> None:
    config = job("Logarithm", (), "+dataset.dark_in_training=17", "train=fast")
    with pytest.raises(NotFinite, match=r"before training, .* 1 of 64 images, .* image 17 of dataset make \(train\)"):
        training.train(Logarithm(), config.train, data_of(config, tmp_path), threads=1)
    finite = data_of(job("Net", ()), tmp_path)
    with pytest.raises(NotFinite, match=r"train\.lr=1e\+30: "):
        training.train(Net(), job("Net", (), "train=fast", "train.lr=1e30").train, finite, threads=1)


class Root(Net):
    """A finite loss, whose gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 * self.fc.bias).sqrt()


def test_weights_that_the_last_step_made_infinite_are_named(job: Callable[..., Config], tmp_path: Path) -> None:
    config = job("Root", (), "train=fast", "train.epochs=1", "train.batch_size=64")
    with pytest.raises(NotFinite, match=r"train\.lr=\S+: fc\.bias became NaN or infinite in epoch 1 of 1; use"):
        training.train(Root(), config.train, data_of(config, tmp_path), threads=1)
