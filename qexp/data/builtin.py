"""The data sets that come with qexp: what `_target_` names in conf/dataset/.

Each is a function of `split` ("train" or "test") that returns a map-style data set of (image, label), as a
user's own does; loading.py does all the rest. Attributes that a data set may have, here or in user code:

    classes      names of the classes, in the order of the labels; without them, classes are called 0, 1, 2 ...
    targets      all labels, so that they need not be read image by image (`labels`, or `samples` of (path, label), too)
    ids          unique names of the images
    fingerprint  text that changes whenever an image does; without it, images are decoded anew in every process
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qexp.errors import InputError, one_line
from qexp.system import file_lock
from qexp.system.download import download

log = logging.getLogger(__name__)

# torchvision.datasets.folder.IMG_EXTENSIONS, and two more
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"})
_NOT_CLASSES = frozenset(
    {"__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "system volume information"}
)
_TEST_NAMES = ("test", "val", "valid", "validation")


class ArrayDataset:
    """uint8 images [N, H, W] or [N, H, W, 3] and int labels [N] in memory."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, classes: Sequence[str], fingerprint: str) -> None:
        self.images, self.targets, self.classes, self.fingerprint = images, targets, tuple(classes), fingerprint

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.targets[index])


def digits(split: str) -> ArrayDataset:
    """scikit-learn's handwritten digits, 8x8 grey, 0 to 255: one fixed half each, stratified; 898 train, 899 test.

    Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten Digits" (its test set).
    """
    table = _digits_table()
    labels = table[:, 64].astype(np.int64)
    # RandomState's streams are frozen for good (NEP 19), so the halves are the same everywhere and always.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    chosen = np.sort(by_class[0::2] if split == "test" else by_class[1::2])
    images = np.round(table[chosen, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    content = hashlib.sha256(images.tobytes() + labels[chosen].tobytes()).hexdigest()
    return ArrayDataset(images, labels[chosen], [str(digit) for digit in range(10)], f"digits {content}")


def _digits_table() -> np.ndarray:
    """int [1797, 65]: 64 pixels of 0 to 16, and the label."""
    # Importing sklearn.datasets takes seconds, in every process of a sweep; its file reads in 30 ms.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError("dataset=digits reads scikit-learn's copy of the digits; install scikit-learn.")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        with gzip.open(file, "rt") as text:
            return np.loadtxt(text, delimiter=",", dtype=np.float64).astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.int64)


def cifar10(split: str, root: str) -> Any:
    """torchvision's CIFAR-10, downloaded to `root` once (170 MB)."""
    return _cifar("CIFAR10", split, root)


def cifar100(split: str, root: str) -> Any:
    """torchvision's CIFAR-100 with its fine labels, downloaded to `root` once (169 MB)."""
    return _cifar("CIFAR100", split, root)


def mnist(split: str, root: str) -> Any:
    """torchvision's MNIST, downloaded to `root` once (12 MB)."""
    return _mnist("MNIST", split, root)


def fashion_mnist(split: str, root: str) -> Any:
    """torchvision's Fashion-MNIST, downloaded to `root` once (30 MB)."""
    return _mnist("FashionMNIST", split, root)


def _cifar(name: str, split: str, root: str) -> Any:
    from qexp.system.torchvision_import import torchvision

    kind = getattr(torchvision.datasets, name)
    folder = Path(root) / kind.base_folder
    names = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    if not all((folder / file).is_file() for file in names):
        with _download_lock(root):
            _fetch([kind.url], Path(root) / kind.filename, kind.tgz_md5, name)
            return _torchvision(kind, split, root, folder, names, download=True)
    return _torchvision(kind, split, root, folder, names, download=False)


def _mnist(name: str, split: str, root: str) -> Any:
    from qexp.system.torchvision_import import torchvision

    kind = getattr(torchvision.datasets, name)
    folder = Path(root) / name / "raw"
    packed = [file for file, _ in kind.resources]
    names = [file.removesuffix(".gz") for file in packed]
    if not all((folder / file).is_file() for file in names):
        with _download_lock(root):
            for file, md5 in kind.resources:
                if not (folder / file.removesuffix(".gz")).is_file():
                    _fetch([mirror + file for mirror in kind.mirrors], folder / file, md5, name)
            return _torchvision(kind, split, root, folder, names, download=True)
    return _torchvision(kind, split, root, folder, names, download=False)


def _torchvision(kind: Any, split: str, root: str, folder: Path, names: Iterable[str], download: bool) -> Any:
    try:
        dataset = kind(root, train=split == "train", download=download)
    except Exception as error:
        raise InputError(
            f"dataset.root={root}: the copy of {kind.__name__} in {folder} can't be read ({one_line(error)}); delete "
            "that folder to have it downloaded again."
        ) from error
    stats = [(file, (folder / file).stat()) for file in names]
    files = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats]
    dataset.fingerprint = f"{kind.__name__} {split} {files}"
    return dataset


def _download_lock(root: str) -> AbstractContextManager[Any]:
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        return file_lock.acquire(Path(root) / ".download.lock", "downloads this data set")
    except OSError as error:
        raise InputError(f"dataset.root={root} can't be written to ({error.strerror or error}).") from error


def _fetch(urls: Sequence[str], path: Path, md5: str, name: str) -> None:
    """Download one of `urls` to `path`, where it is not there already.

    torchvision's own download has no time-out, writes its bar where there is no terminal, and leaves partial files.
    """
    if path.is_file() and _md5(path) == md5:
        return
    failures = []
    for url in urls:
        try:
            download(url, path, lambda file: _md5(file) == md5)
            return
        except OSError as error:
            failures.append(f"{url}: {getattr(error, 'reason', None) or error}")
    raise InputError(
        f"{name} is not under dataset.root={_root_of(path)}, and can't be downloaded ({'; '.join(failures)}); put a"
        f" copy of {path.name} at {path}, or use dataset=digits, which needs no download."
    )


def _root_of(path: Path) -> Path:
    return path.parent.parent.parent if path.parent.name == "raw" else path.parent


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def imagefolder(split: str, root: str, train: str = "train", test: str | None = None) -> ImageFolder:
    """Images in `root`/train/<class>/ and `root`/test/<class>/ (or val/), at any depth below the class.

    train, test: names of the two folders; null takes the one of test, val, valid and validation that there is.
    """
    base = Path(root)
    if not base.is_dir():
        what = "is a file" if base.exists() else "does not exist"
        raise InputError(f"dataset.root={root} {what}; give a folder with train/<class>/ and test/<class>/ (or val/).")
    if split == "train":
        return list_images(base, _split_folder(base, train, "train", (train,)))
    return list_images(base, _split_folder(base, test, "test", _TEST_NAMES))


def _split_folder(base: Path, asked: str | None, setting: str, candidates: Sequence[str]) -> str:
    there = sorted(entry.name for entry in _scan(base) if entry.is_dir() and not _hidden(entry.name))
    if asked is not None and (base / asked).is_dir():
        return asked
    wanted = (asked,) if asked is not None else candidates
    found = [name for candidate in wanted for name in there if name.lower() == candidate.lower()]
    if not found:
        listed = ", ".join(there[:5]) + (" ..." if len(there) > 5 else "") or "no folders"
        raise InputError(
            f"dataset.root={base} has no folder {' or '.join(wanted)}, but {listed}; it must hold train/<class>/ and"
            f" test/<class>/ (or val/), or say which by dataset.{setting}=<folder>."
        )
    if len(found) > 1 and found[0].lower() == found[1].lower():
        raise InputError(
            f"dataset.root={base} has folders {found[0]} and {found[1]}, whose names differ in case only; make one of"
            f" them, or say which by dataset.{setting}=<folder>."
        )
    if len(found) > 1:
        log.info("evaluating on %s, not on %s; dataset.test=%s takes that one", found[0], found[1], found[1])
    return found[0]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of one split: (PIL image, label), labels counted over the sorted names of its class folders.

    targets: int64 [N]; paths: below base; inodes: what the files are, whatever their names, and their positions.
    """

    base: Path
    classes: tuple[str, ...]
    targets: np.ndarray
    paths: tuple[str, ...]
    fingerprint: str
    inodes: Mapping[tuple[int, int], int]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(map(_readable, self.paths))

    def packed(self) -> dict[str, np.ndarray]:
        """All but the inodes, as arrays."""
        texts = [str(self.base), self.fingerprint, *self.classes]
        return {"targets": self.targets, "paths": _packed(self.paths), "texts": _packed(texts)}

    @staticmethod
    def unpacked(arrays: Mapping[str, np.ndarray]) -> ImageFolder:
        """The inverse of `packed`."""
        base, fingerprint, *classes = _unpacked(arrays["texts"])
        return ImageFolder(
            Path(base), tuple(classes), arrays["targets"], tuple(_unpacked(arrays["paths"])), fingerprint, {}
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.base / self.paths[index]) as image:
            image.load()  # the first frame, where there are several
            return image, int(self.targets[index])


def list_images(base: Path, split: str) -> ImageFolder:
    """List the images in `base`/`split`/<class>/. Raises InputError where they can't be used."""
    folder = base / split
    entries = _scan(folder)
    classes = tuple(sorted(e.name for e in entries if e.is_dir() and not _hidden(e.name)))
    loose = [e.name for e in entries if not e.is_dir() and _is_image(e.name)]
    if not classes:
        what = f"images but no class folders ({loose[0]})" if loose else "no class folders"
        raise InputError(f"dataset.root={base}: {folder} has {what}; sort the images into {split}/<class>/.")
    ignored = Counter([f"images outside of class folders in {split}/"] * len(loose))
    ignored.update(_hidden_kind(entry) for entry in entries if _hidden(entry.name))
    files: list[tuple[str, os.stat_result]] = []
    counts = []
    for name in classes:
        before = len(files)
        files += sorted(_walk(folder / name, f"{split}/{name}", ignored, frozenset()), key=lambda file: file[0])
        counts.append(len(files) - before)
    if ignored:
        left_out = ", ".join(f"{count} {what}" for what, count in sorted(ignored.items()))
        log.info("%s: left out %s", folder, left_out)
    if not files:
        raise InputError(
            f"dataset.root={base}: the class folders of {split} ({classes[0]}, say) hold no images; images end"
            f" in {', '.join(sorted(EXTENSIONS))}."
        )
    # An extracted archive can give another image the same size and time of modification, but not of change.
    listed = "".join(f"{path}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ctime_ns}\n" for path, s in files)
    digest = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
    return ImageFolder(
        base,
        classes,
        np.repeat(np.arange(len(classes)), counts),
        tuple(path for path, _ in files),
        f"imagefolder {base} {digest}",
        {(s.st_dev, s.st_ino): i for i, (_, s) in enumerate(files)},
    )


def _packed(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(texts: np.ndarray) -> list[str]:
    return texts.tobytes().decode("utf-8", "surrogateescape").split("\0")


def refuse_shared_files(train: ImageFolder, test: ImageFolder) -> None:
    """Raises InputError where a file, by whatever link, is in both splits: calibration would see evaluation images."""
    shared = sorted((i, test.inodes[inode]) for inode, i in train.inodes.items() if inode in test.inodes)
    if shared:
        first, second = shared[0]
        raise InputError(
            f"dataset.root={train.base}: {len(shared)} of {len(test)} evaluation images are training images too"
            f" ({train.ids[first]} and {test.ids[second]} are one file); what is calibrated on can't be evaluated on."
        )


def _readable(path: str) -> str:
    """A path as text: what of its bytes is no UTF-8 is spelled out."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _walk(
    folder: Path, relative: str, ignored: Counter[str], above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, os.stat_result]]:
    """Relative path and stat of every image below `folder`; links are followed. Counts in `ignored` what is none."""
    here = folder.stat()
    inode = (here.st_dev, here.st_ino)
    if inode in above:
        raise InputError(f"{folder} is a link to a folder that it lies in; remove it.")
    for entry in _scan(folder):
        name, suffix = entry.name, _suffix(entry.name)
        if suffix in EXTENSIONS and not name.startswith(".") and not entry.is_dir():
            yield f"{relative}/{name}", _stat(entry)
        elif _hidden(name):
            ignored[_hidden_kind(entry)] += 1
        elif entry.is_dir():
            yield from _walk(folder / name, f"{relative}/{name}", ignored, above | {inode})
        else:
            ignored[f"files {suffix or 'without extension'}"] += 1


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        found = entry.stat()
    except FileNotFoundError:
        missing = Path(entry.path).readlink()
        raise InputError(f"{entry.path} is a link to {missing}, which is missing; mend or remove it.") from None
    except OSError as error:
        raise InputError(f"{entry.path} can't be read ({error.strerror}).") from error
    if found.st_size == 0:
        raise InputError(f"{entry.path} is an empty file, not an image; replace or remove it.")
    return found


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"the folder {folder} can't be listed ({error.strerror}).") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NOT_CLASSES


def _hidden_kind(entry: os.DirEntry[str]) -> str:
    return "hidden folders" if entry.is_dir() else "hidden files"


def _is_image(name: str) -> bool:
    return not _hidden(name) and _suffix(name) in EXTENSIONS


def _suffix(name: str) -> str:
    # pathlib's takes as long as listing the folder
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""
