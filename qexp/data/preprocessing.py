"""From one image, of whatever kind, to uint8 pixels [3, H, W]: RGB, resize, centre crop, as torchvision does them.

Knows neither torch nor files. `check` is everything that a `dataset` group's settings show by themselves.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from qexp.errors import ConfigError

# Names as in torchvision.transforms.InterpolationMode.
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

EXIF_ORIENTATION = 0x0112
_MAX_SIDE = 8192


class UnusableImage(ValueError):
    """The rest of the sentence "this image ..."."""


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


def to_pixels(image: Any, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [3, H, W] of a PIL image, or of an array or tensor of 8-bit pixels (HWC, CHW or HW).

    Equals torchvision's Resize(resize), CenterCrop(image_size) on `image.convert("RGB")`, bit for bit; alpha is
    dropped, and an EXIF rotation not applied, as there. A crop is never padded. Raises UnusableImage.
    """
    picture = _crop(_resize(_to_rgb(image), preprocessing), preprocessing)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _to_rgb(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        return Image.fromarray(_to_hwc(image))
    if image.mode.startswith("I;16"):
        # convert() clips 16-bit greys to 255, which leaves a white image.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnusableImage(f"has 32-bit pixels (mode {image.mode}), whose scale can't be known; save it with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns; the colours are the same
    return image.convert("RGB")


def _to_hwc(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] of an array or tensor."""
    is_tensor = hasattr(image, "detach")
    try:
        values = np.asarray(image.detach().cpu() if is_tensor else image)
    except Exception as error:
        raise UnusableImage(f"is a {type(image).__name__}; return a PIL image, or a uint8 array or tensor") from error
    if values.ndim not in (2, 3) or values.dtype.kind not in "uifb" or 0 in values.shape:
        raise UnusableImage(
            f"is a {type(image).__name__} of shape {values.shape} and dtype {values.dtype}; return a PIL image, or a"
            " uint8 array or tensor of shape HWC, CHW or HW"
        )
    values = _to_uint8(values)
    if values.ndim == 2:
        values = values[:, :, None]
    else:
        channels_first, channels_last = values.shape[0] in (1, 3, 4), values.shape[2] in (1, 3, 4)
        if not channels_first and not channels_last:
            raise UnusableImage(f"has shape {values.shape}; its first or last axis must be 1, 3 or 4 channels")
        # Where both could be channels, tensors are CHW and arrays HWC, as all over torchvision.
        if channels_first and (is_tensor or not channels_last):
            values = values.transpose(1, 2, 0)
    return np.ascontiguousarray(np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values[:, :, :3])


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        levels = np.round(values.astype(np.float64) * 255)
        if low >= 0 and high <= 1 and np.abs(levels - values.astype(np.float64) * 255).max() < 1e-3:
            return levels.astype(np.uint8)  # what ToTensor made of 8-bit pixels
        raise UnusableImage(
            f"has values of dtype {values.dtype} from {low:.4g} to {high:.4g}, not 8-bit pixels; return images before"
            " normalisation, which qexp does by dataset.mean and dataset.std"
        )
    if low < 0 or high > 255:
        raise UnusableImage(f"has values from {low} to {high}; pixels are uint8, from 0 to 255")
    return values.astype(np.uint8)


def _resize(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    short = preprocessing.resize
    width, height = picture.size
    if short is None or min(width, height) == short:
        return picture
    # torchvision truncates the long side
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    return picture.resize(size, INTERPOLATIONS[preprocessing.interpolation])


def _crop(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    side = preprocessing.image_size
    width, height = picture.size
    if side is None or (width, height) == (side, side):
        return picture
    if min(width, height) < side:
        raise UnusableImage(
            f"is {width}x{height}, smaller than dataset.image_size={side}; set dataset.resize={side} or more, or a"
            " smaller dataset.image_size"
        )
    left, top = round((width - side) / 2.0), round((height - side) / 2.0)
    return picture.crop((left, top, left + side, top + side))


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
