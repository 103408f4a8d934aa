"""Preprocessing of one image to uint8 pixels [3, H, W]: RGB, resize, centre crop, equal to torchvision's.

Imports no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from qexp.config.image_settings import Preprocessing

EXIF_ORIENTATION = 0x0112


class UnusableImage(ValueError):
    """The rest of the sentence "this image ..."."""


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
    return picture.resize(size, Image.Resampling[preprocessing.interpolation.upper()])


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
