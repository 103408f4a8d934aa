"""Load and check a data set: from a `dataset` group of the configuration to two splits of uint8 images and labels.

The images come from a callable (`_target_`), qexp's own in builtin.py or the user's. Here they are resized and cached
once decoded, and labels get the same classes in both splits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import PIL.features
import torch
from PIL import Image
from tqdm import tqdm

from qexp.config import code_digest, image_settings, instantiation
from qexp.config.image_settings import ImageSettings, Preprocessing
from qexp.data import builtin
from qexp.data import preprocessing as images
from qexp.errors import InputError, QexpError, one_line
from qexp.system import cache, machine_lock
from qexp.system.cache import hash_of, read_only
from qexp.system.steps import step

log = logging.getLogger(__name__)

RESERVED = frozenset({"classes", "mean", "std", "resize", "image_size", "interpolation", "margin"})

# Items that are read at once by a thread, and how many training images are looked up among the evaluation images.
_BLOCK = 256
_SAMPLE = 64


@dataclass(frozen=True, eq=False)
class Source:
    """The data set that `_target_` returned for one split, and how its images are read. key: of the cache, None where
    the data set has no fingerprint."""

    name: str
    split: str
    dataset: Any
    raw_labels: np.ndarray
    ids: tuple[str, ...]
    preprocessing: Preprocessing
    key: str | None

    def read(self, index: int, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, bool]:
        """The pixels of one image, uint8 [3, H, W], and True if it has an EXIF rotation. Raises InputError."""
        image, label = _item(self, index)
        try:
            pixels = images.to_pixels(image, self.preprocessing)
        except images.UnusableImage as error:
            raise InputError(f"{self.where(index)} {error}.") from error
        except Exception as error:
            raise InputError(f"{self.where(index)} can't be decoded ({one_line(error)}).") from error
        if label != self.raw_labels[index]:
            raise InputError(
                f"{self.where(index)} has label {label}, where its data set's list of labels has"
                f" {self.raw_labels[index]}; the two must agree."
            )
        if shape is not None and pixels.shape != shape:
            raise InputError(
                f"{self.where(index)} is {pixels.shape[2]}x{pixels.shape[1]} where others are {shape[2]}x{shape[1]};"
                " all must have one size; set dataset.image_size for a centre crop, and dataset.resize for the short"
                f" side before it (dataset.resize={min(shape[1:])} dataset.image_size={min(shape[1:])}, say)."
            )
        rotated = isinstance(image, Image.Image) and image.getexif().get(images.EXIF_ORIENTATION, 1) != 1
        return pixels, rotated

    def where(self, index: int) -> str:
        """The image's name for messages."""
        if isinstance(self.dataset, builtin.ImageFolder):
            return f"the image {self.dataset.base / self.ids[index]}"
        return f"image {self.ids[index]} of dataset {self.name} ({self.split})"


@dataclass(frozen=True, eq=False)
class Split:
    """One half of the data. labels: int64 [N], read-only; ids: N unique names; shape: (3, H, W) of every image."""

    name: str
    labels: np.ndarray
    ids: tuple[str, ...]
    shape: tuple[int, int, int]
    source: Source
    folder: Path | None

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, 3, H, W], read-only: the images at `indices`, decoded now, or all of them, memory-mapped.

        Raises InputError that names the image where one can't be used.
        """
        if indices is None:
            return self._all.array
        if "_all" in self.__dict__:
            chosen = self._all.array[indices]
        else:
            chosen = np.empty((len(indices), *self.shape), np.uint8)
            self._decode(np.asarray(indices, np.int64), chosen)
        chosen.flags.writeable = False
        return chosen

    def drawn(self, indices: np.ndarray) -> np.ndarray:
        """As `pixels`, but decoded once for all runs that use the same indices, and memory-mapped."""
        if self.source.key is None:
            return self.pixels(indices)
        indices = np.ascontiguousarray(indices, np.int64)
        key = json.dumps(["drawn", self.source.key, hashlib.sha256(indices.tobytes()).hexdigest()])

        def fill(out: np.ndarray) -> None:
            out[...] = self.pixels(indices)

        return cache.filled(self.folder, key, (len(indices), *self.shape), np.uint8, fill).array

    @cached_property
    def digest(self) -> str:
        """Hex digest of every pixel and label; decodes the whole split the first time."""
        return hash_of([self._all.sha256, hashlib.sha256(self.labels.tobytes()).hexdigest()])

    @cached_property
    def _all(self) -> cache.Entry:
        shape = (len(self), *self.shape)

        def fill(out: np.ndarray) -> None:
            self._decode(np.arange(len(self)), out)

        if self.source.key is None:
            return cache.scratch(self.folder, shape, np.uint8, fill)
        return cache.filled(self.folder, self.source.key, shape, np.uint8, fill)

    def _decode(self, indices: np.ndarray, out: np.ndarray) -> None:
        description = f"decode {self.name} {self.source.split}"
        with tqdm(total=len(indices), desc=description, unit="image", disable=None, leave=False) as bar:

            @machine_lock.computing()
            def block(start: int) -> int:
                rotated = 0
                for position in range(start, min(start + _BLOCK, len(indices))):
                    out[position], turned = self.source.read(int(indices[position]), self.shape)
                    rotated += turned
                    bar.update()
                return rotated

            with machine_lock.released():
                rotated = sum(_in_threads(block, range(0, len(indices), _BLOCK), self.source.dataset))
        if rotated:
            log.info(
                "%s: %d images carry an EXIF rotation, which is not applied, as in torchvision's ImageFolder",
                self.name, rotated,
            )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Data:
    """mean, std: of three channels, for pixels scaled to 0 to 1; margin: the tolerated loss of accuracy.

    digest: of the evaluation images, the labels of both splits, their meaning, and the normalisation.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: float
    digest: str


@step("load data")
def load_data(dataset: Mapping[str, Any], cache: Path | None, sweep: str = "") -> Data:
    """The data set that `dataset` (plain values, as in Config.dataset) describes; decoded images are cached in `cache`
    (None: in memory).

    All evaluation images are decoded here the first time. sweep: identity of a sweep, whose jobs
    share the first one's listing of a folder. Raises ConfigError for settings that can't work,
    InputError, which names the image, folder or label, for a data set that can't be used.
    """
    settings = image_settings.check(dataset)
    name = str(dataset.get("_target_")).rpartition(".")[2]
    train = _open(dataset, "train", name, settings.preprocessing, cache, sweep)
    test = _open(dataset, "test", name, settings.preprocessing, cache, sweep)
    if isinstance(train.dataset, builtin.ImageFolder) and isinstance(test.dataset, builtin.ImageFolder):
        builtin.refuse_shared_files(train.dataset, test.dataset)
    classes, train_labels, test_labels = _meaning(name, settings, train, test)
    first = test.read(0)[0]
    shape = (first.shape[0], first.shape[1], first.shape[2])
    train_split = Split(name, read_only(train_labels), train.ids, shape, train, cache)
    test_split = Split(name, read_only(test_labels), test.ids, shape, test, cache)
    _refuse_shared_images(train_split, test_split)
    of_labels = hashlib.sha256(train_labels.tobytes()).hexdigest()
    digest = hash_of([test_split.digest, of_labels, classes, settings.mean, settings.std])
    return Data(name, train_split, test_split, classes, settings.mean, settings.std, settings.margin, digest)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels / 255 - mean) / std: float32 [n, 3, H, W], contiguous, of uint8 [n, 3, H, W].

    Equals torchvision's ToTensor and Normalize bit for bit.
    """
    values = torch.from_numpy(np.array(pixels, dtype=np.float32, order="C")).div_(255)
    by_channel = (1, -1, 1, 1)
    return values.sub_(torch.tensor(mean).view(by_channel)).div_(torch.tensor(std).view(by_channel))


def digest_of(pixels: np.ndarray) -> str:
    """Hex digest of images: their dtype, shape and values."""
    values = np.ascontiguousarray(pixels)
    return hash_of([values.dtype.str, values.shape, hashlib.sha256(values.data).hexdigest()])


def count_shared(pixels: np.ndarray, test: Split) -> int:
    """The number of images among `pixels`, uint8 [n, 3, H, W], that are evaluation images too, pixel for pixel."""
    if len(pixels) == 0:
        return 0
    known = test.pixels().reshape(len(test), -1)
    asked = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    # A thin sample of every image rules out nearly all of them, without hashing gigabytes.
    thin = slice(None, None, max(1, known.shape[1] // 64))
    by_sample: dict[bytes, list[int]] = {}
    for i, row in enumerate(np.ascontiguousarray(known[:, thin])):
        by_sample.setdefault(row.tobytes(), []).append(i)
    return sum(
        any(np.array_equal(row, known[i]) for i in by_sample.get(np.ascontiguousarray(row[thin]).tobytes(), ()))
        for row in asked
    )


def _open(
    dataset: Mapping[str, Any], split: str, name: str, preprocessing: Preprocessing, folder: Path | None, sweep: str
) -> Source:
    """Call `_target_` for `split`, and find labels and names of what it returns."""
    spec = {key: value for key, value in dataset.items() if not (key == "root" and value is None)}
    if "root" in spec:
        spec["root"] = str(Path(str(spec["root"])).expanduser().absolute())
    function, arguments = instantiation.resolve("dataset", spec, reserved=RESERVED, supplied={"split"})
    target = str(spec["_target_"])
    try:
        with machine_lock.released():  # it may download, and is anybody's code
            made = _made(function, {**arguments, "split": split}, folder, sweep)
        size = len(made) if hasattr(made, "__getitem__") else 0
    except QexpError:
        raise
    except Exception as error:
        raise InputError(f"dataset._target_={target}: split={split} fails with {one_line(error)}.") from error
    if not hasattr(made, "__getitem__"):
        raise InputError(
            f"dataset._target_={target} returns a {type(made).__name__}; return a map-style data set, with __len__ and"
            " __getitem__, not a loader or an iterable."
        )
    if size == 0:
        raise InputError(f"dataset._target_={target} returns a data set without images for split={split}.")
    fingerprint = getattr(made, "fingerprint", None)
    key = None
    if isinstance(fingerprint, str):
        plain = json.dumps({k: v for k, v in spec.items() if k not in RESERVED}, default=str, sort_keys=True)
        key = hash_of(["images", _decoder(), plain, split, fingerprint, repr(preprocessing)])
    source = Source(name, split, made, np.empty(0, np.int64), _ids(made, size), preprocessing, key)
    labels = _labels(source, size, folder)
    source = Source(name, split, made, labels, source.ids, preprocessing, key)
    if not target.startswith("qexp.data.builtin."):
        _refuse_random(source, target)
    return source


def _made(function: Callable[..., Any], arguments: Mapping[str, Any], folder: Path | None, sweep: str) -> Any:
    """Call `_target_`. A sweep lists a folder of images only once, since that takes 0.7 s for 60,000 files."""
    if function is not builtin.imagefolder or not sweep:
        return function(**arguments)
    key = json.dumps(["listing", sweep, dict(arguments)], sort_keys=True)
    found = cache.find_arrays(folder, key)
    if found is not None:
        return builtin.ImageFolder.unpacked(found)
    made = builtin.imagefolder(**arguments)
    cache.arrays(folder, key, made.packed)
    return made


@functools.cache
def _decoder() -> str:
    """Identity of the code that turns files into pixels."""
    libraries = (PIL.__version__, PIL.features.version("jpg"), PIL.features.version("webp"))
    return hash_of([code_digest.of("data.builtin", "data.preprocessing"), libraries])


def _ids(dataset: Any, size: int) -> tuple[str, ...]:
    given = getattr(dataset, "ids", None)
    if isinstance(given, list | tuple) and len(given) == size and len(set(given)) == size:
        return tuple(str(name) for name in given)
    return tuple(str(i) for i in range(size))


def _item(source: Source, index: int) -> tuple[Any, int]:
    try:
        item = source.dataset[index]
    except Exception as error:
        raise InputError(f"{source.where(index)} can't be read ({one_line(error)}).") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"a {type(item).__name__}"
        if isinstance(item, Mapping):
            what += f" with the keys {', '.join(map(str, item))}"
        elif isinstance(item, tuple | list):
            what += f" of {len(item)}"
        raise InputError(f"{source.where(index)} is {what}; items must be pairs of an image and an integer label.")
    return item[0], _label(source, index, item[1])


def _label(source: Source, index: int, value: Any) -> int:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.size == 1 and array.dtype.kind in "iu":
        return int(array.reshape(-1)[0])
    what = f"an array of shape {array.shape}" if array.size != 1 else f"{value!r}, a {type(value).__name__}"
    hint = " (for one-hot labels, their argmax)" if array.size > 1 else ""
    raise InputError(f"{source.where(index)} has as its label {what}; return an integer, 0 for the first class{hint}.")


def _labels(source: Source, size: int, folder: Path | None) -> np.ndarray:
    """int64 [N], as the data set counts them: from its list of labels if it has one that agrees, else item by item."""
    listed = _listed_labels(source.dataset, size)
    if listed is not None:
        probes = sorted({0, size // 2, size - 1})
        if isinstance(source.dataset, builtin.ImageFolder) or all(_item(source, i)[1] == listed[i] for i in probes):
            return listed

    @machine_lock.computing()
    def label_of(index: int) -> int:
        return _item(source, index)[1]

    def read_all() -> np.ndarray:
        description = f"read labels of {source.name} {source.split}"
        with tqdm(range(size), desc=description, unit="image", disable=None, leave=False) as indices:
            return np.array([label_of(i) for i in indices], np.int64)

    return read_all() if source.key is None else cache.array(folder, f"labels {source.key}", read_all)


def _listed_labels(dataset: Any, size: int) -> np.ndarray | None:
    for attribute in ("targets", "labels", "samples"):
        given = getattr(dataset, attribute, None)
        if given is None or callable(given):
            continue
        try:
            values = [label for _, label in given] if attribute == "samples" else given
            labels = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        except Exception as error:  # whatever it is, it is no list of labels, and the items say it all the same
            said = "%s of %s is no list of labels: %s"
            log.debug(said, attribute, type(dataset).__name__, one_line(error))
            continue
        if labels.shape == (size,) and labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    return None


def _refuse_random(source: Source, target: str) -> None:
    for index in range(min(4, len(source.raw_labels))):
        if not np.array_equal(source.read(index)[0], source.read(index)[0]):
            raise InputError(
                f"dataset._target_={target} gives another image each time for item {index} of split={source.split};"
                " return images without random transforms: augmentation is qexp's, by train.augment."
            )


def _meaning(
    name: str, settings: ImageSettings, train: Source, test: Source
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """The class names, and the labels of both splits counted over them."""
    names = {source.split: _names(source.dataset) for source in (train, test)}
    in_train, in_test = names["train"] or names["test"], names["test"] or names["train"]
    if in_train is None or in_test is None:
        classes = _unnamed(name, settings, train, test)
        in_train = in_test = classes
    else:
        _refuse_twins(name, settings, _with_images(train, in_train), _with_images(test, in_test), {*in_train, *in_test})
        classes = _named(name, settings, in_train, in_test)
    if len(classes) < 2:
        raise InputError(
            f"dataset={name} has one class ({classes[0]}); a classifier is evaluated on two or more, so add the others."
        )
    position = {label: i for i, label in enumerate(classes)}
    labels = []
    for source, own in ((train, in_train), (test, in_test)):
        low, high = int(source.raw_labels.min()), int(source.raw_labels.max())
        if low < 0 or high >= len(own):
            hint = ", so subtract 1" if low == 1 and high == len(own) else ""
            raise InputError(
                f"dataset={name} has labels from {low} to {high} for split={source.split}, where {len(own)} classes"
                f" need 0 to {len(own) - 1}{hint}."
            )
        labels.append(np.array([position[label] for label in own], np.int64)[source.raw_labels])
    _say_missing(name, classes, labels[0], labels[1])
    return classes, labels[0], labels[1]


def _names(dataset: Any) -> tuple[str, ...] | None:
    given = getattr(dataset, "classes", None)
    if not isinstance(given, list | tuple) or not given or not all(isinstance(name, str | int) for name in given):
        return None
    names = tuple(str(name) for name in given)
    return names if len(set(names)) == len(names) else None


def _unnamed(name: str, settings: ImageSettings, train: Source, test: Source) -> tuple[str, ...]:
    if isinstance(settings.classes, tuple):
        return settings.classes
    count = settings.classes
    if count is None:
        low = min(int(train.raw_labels.min()), int(test.raw_labels.min()))
        count = 1 + max(int(train.raw_labels.max()), int(test.raw_labels.max()))
        if low > 0:
            raise InputError(
                f"dataset={name} has labels from {low} to {count - 1}, and the first class is 0; subtract {low}, or set"
                f" dataset.classes={count} if class 0 has no images."
            )
    return tuple(str(i) for i in range(max(count, 1)))


def _named(name: str, settings: ImageSettings, in_train: tuple[str, ...], in_test: tuple[str, ...]) -> tuple[str, ...]:
    found = in_train if in_train == in_test else tuple(sorted({*in_train, *in_test}))
    wanted = settings.classes
    if isinstance(wanted, tuple):
        extra = sorted(set(found) - set(wanted))
        if extra:
            raise InputError(
                f"dataset.classes lists {len(wanted)} classes, and {name} has others too ({', '.join(extra[:3])}); list"
                " them, or take them out of the data."
            )
        return wanted
    if wanted is not None and wanted != len(found):
        raise InputError(
            f"dataset.classes={wanted}, and {name} has {len(found)} ({', '.join(found[:3])} ...); give the list of all"
            " names in the order of the labels, dataset.classes=[first,second,...]."
        )
    if all(label.isdecimal() for label in found) and list(found) != sorted(found, key=int):
        log.info(
            "%s: class names are sorted as text (%s ...), as torchvision does; if the model counts them as numbers, set"
            " dataset.classes to the list of names in its order", name, ", ".join(found[:4]),
        )  # fmt: skip
    return found


def _with_images(source: Source, classes: tuple[str, ...]) -> frozenset[str]:
    """The classes that have images in a split."""
    return frozenset(classes[label] for label in np.unique(source.raw_labels) if 0 <= label < len(classes))


def _refuse_twins(
    name: str, settings: ImageSettings, in_train: frozenset[str], in_test: frozenset[str], classes: Collection[str]
) -> None:
    """Raises InputError for names that are one to a reader, unless they are two classes: both splits have images of
    each, or dataset.classes lists them."""

    def read(label: str) -> str:
        return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label).casefold()).strip()

    listed = settings.classes if isinstance(settings.classes, tuple) else ()
    alike: dict[str, list[str]] = {}
    for label in sorted(classes):
        alike.setdefault(read(label), []).append(label)
    for labels in alike.values():
        if len(labels) == 1 or set(labels) <= in_train & in_test or set(labels) <= set(listed):
            continue
        where = {(True, True): "both splits", (True, False): "train", (False, True): "test", (False, False): "no split"}
        told = ", ".join(f"{label!a} (images in {where[label in in_train, label in in_test]})" for label in labels)
        raise InputError(
            f"dataset={name} has classes whose names differ in nothing but case, spaces or the form of letters: {told};"
            " give them one name, or list all classes in dataset.classes if these are two."
        )


def _say_missing(name: str, classes: tuple[str, ...], train: np.ndarray, test: np.ndarray) -> None:
    of_train, of_test = (np.bincount(labels, minlength=len(classes)) for labels in (train, test))
    for split, counts, others in (("train", of_train, of_test), ("test", of_test, of_train)):
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            unknown = int(np.sum(others[empty])) if split == "train" else 0
            effect = (
                f", so a model that is trained on it can't know {unknown} of the evaluation images" if unknown else ""
            )
            log.info(
                "%s: %d of %d classes have no images in %s (%s%s)%s", name, len(empty), len(classes), split,
                ", ".join(classes[i] for i in empty[:3]), " ..." if len(empty) > 3 else "", effect,
            )  # fmt: skip


def _refuse_shared_images(train: Split, test: Split) -> None:
    """Raises InputError if evaluation images turn up among the training images, whatever their names.

    A callable that ignores `split`, or draws it anew in each call, shares many; real data share a few in a thousand.
    """
    sample = np.unique(np.linspace(0, len(train) - 1, _SAMPLE).astype(np.int64))

    def count() -> np.ndarray:
        return np.array([count_shared(train.pixels(sample), test)])

    keys = (train.source.key, test.source.key)
    shared = count() if None in keys else cache.array(test.folder, f"shared images {keys} {_SAMPLE}", count)
    if shared[0] > 0.1 * len(sample):
        raise InputError(
            f"dataset={train.name}: of {len(sample)} training images looked at, {int(shared[0])} are evaluation images"
            " too, pixel for pixel; what is calibrated on can't be evaluated on, so keep split=train and split=test"
            " apart."
        )


def _in_threads(work: Callable[[int], int], starts: range, dataset: Any) -> list[int]:
    """[work(start) ...]; in threads only for files, since a user's data set need not be safe for them."""
    if not isinstance(dataset, builtin.ImageFolder) or len(starts) == 1:
        return [work(start) for start in starts]
    pool = ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    try:
        return list(pool.map(work, starts))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
