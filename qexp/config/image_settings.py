"""Checks of a `dataset` group's settings: preprocessing, normalisation, the margin, classes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from qexp.errors import ConfigError

# As in torchvision.transforms.InterpolationMode, and in Pillow in capitals.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


_MAX_SIDE = 8192


@dataclass(frozen=True)
class Preprocessing:
    """resize: length that the short side gets, in pixels; image_size: side of the centre crop; None leaves it out."""

    resize: int | None
    image_size: int | None
    interpolation: str


@dataclass(frozen=True)
class ImageSettings:
    """The checked reserved keys of a `dataset` group; mean and std have three values in the scale 0 to 1."""

    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: float
    classes: tuple[str, ...] | int | None


def check(dataset: Mapping[str, Any]) -> ImageSettings:
    """The reserved keys of `dataset`. Raises ConfigError for what the configuration alone shows to be wrong."""
    resize, image_size = _pixels(dataset, "resize"), _pixels(dataset, "image_size")
    if resize is not None and image_size is not None and resize < image_size:
        raise ConfigError(
            f"dataset.resize={resize} makes images smaller than dataset.image_size={image_size}; resize to at least"
            f" dataset.resize={image_size}."
        )
    interpolation = dataset.get("interpolation", "bilinear")
    if interpolation not in INTERPOLATIONS:
        raise ConfigError(f"dataset.interpolation={interpolation} is not one of {', '.join(INTERPOLATIONS)}.")
    mean, std = _per_channel(dataset, "mean"), _per_channel(dataset, "std")
    if min(std) <= 0:
        raise ConfigError(f"dataset.std={dataset['std']} must be above 0: pixels are divided by it.")
    if min(mean) < 0:
        raise ConfigError(f"dataset.mean={dataset['mean']} must be between 0 and 1, the scale of the pixels.")
    margin = dataset.get("margin")
    if not _is_number(margin) or not 0 < margin < 1:
        raise ConfigError(f"dataset.margin={margin} must be a fraction between 0 and 1, as 0.005 for half a point.")
    return ImageSettings(
        Preprocessing(resize, image_size, interpolation), mean, std, float(margin), _classes(dataset.get("classes"))
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _pixels(dataset: Mapping[str, Any], key: str) -> int | None:
    value = dataset.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIDE:
        raise ConfigError(f"dataset.{key}={value} must be a number of pixels from 1 to {_MAX_SIDE}, or null.")
    return value


def _per_channel(dataset: Mapping[str, Any], key: str) -> tuple[float, ...]:
    given = dataset.get(key)
    listed = list(given) if isinstance(given, list | tuple) else [given]
    values = [float(value) for value in listed if _is_number(value)]
    if len(listed) not in (1, 3) or len(values) != len(listed):
        raise ConfigError(f"dataset.{key}={given} must be one number or three, one for each of red, green and blue.")
    if max(values) > 1:
        scaled = ",".join(f"{value / 255:.4g}" for value in values)
        raise ConfigError(
            f"dataset.{key}={given} is above 1; pixels are scaled to 0 to 1 first, so divide by 255:"
            f" dataset.{key}=[{scaled}]."
        )
    return tuple(values * 3 if len(values) == 1 else values)


def _classes(given: Any) -> tuple[str, ...] | int | None:
    allowed = "the list of the class names in the order of the labels, their number, or null to find them"
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool) and given >= 2:
        return given
    if not isinstance(given, list | tuple) or len(given) < 2:
        raise ConfigError(f"dataset.classes={given} must be {allowed}, and at least two.")
    for name in given:
        # YAML reads yes, no, on and off as truth values, and 1.0 as a number
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ConfigError(f"dataset.classes has {name}, a {type(name).__name__}; put the name into quotes.")
    names = tuple(str(name) for name in given)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"dataset.classes has {twice[0]} twice; each name stands for one label.")
    return names
