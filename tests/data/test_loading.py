"""data.py, datasets.py, images.py: what is decoded, what labels mean, what is drawn, and what is refused."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qexp.config import image_settings
from qexp.config.schema import Calib, Sampling
from qexp.data import calibration_images, preprocessing
from qexp.data import loading as data_module
from qexp.data.calibration_images import draw
from qexp.data.loading import Data, count_shared, digest_of, load_data, normalise
from qexp.errors import ConfigError, InputError
from tests.helpers import ROOT

CONF = ROOT / "conf" / "dataset"
PLAIN = image_settings.Preprocessing(None, None, "bilinear")


def spec(name: str, **overrides: Any) -> dict[str, Any]:
    return {**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **overrides}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data(spec("digits"), tmp_path_factory.mktemp("cache"))


def noise(size: tuple[int, int] = (12, 10), seed: int = 0, mode: str = "RGB") -> Image.Image:
    width, height = size
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def tree(root: Path, train: Mapping[str, int], test: Mapping[str, int], test_name: str = "test") -> Path:
    """Distinct PNG images: so many for each class of each split."""
    seed = 0
    for split, classes in (("train", train), (test_name, test)):
        for label, count in classes.items():
            (root / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed += 1
                noise(seed=seed).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tree(tmp_path / "set", {"cat": 3, "dog": 2}, {"cat": 2, "dog": 2})


def load(root: Path, tmp_path: Path, **overrides: Any) -> Data:
    return load_data(spec("imagefolder", root=str(root), **overrides), tmp_path / "cache")


def refusal(root: Path, tmp_path: Path, kind: type[Exception] = InputError, **overrides: Any) -> str:
    with pytest.raises(kind) as caught:
        load(root, tmp_path, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_group_file_names_every_reserved_key_and_starts_with_a_comment(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    assert {*data_module.RESERVED, "root", "_target_"} <= set(settings)
    assert file.read_text().startswith("# ")
    assert image_settings.check(settings).margin == (0.02 if file.stem == "digits" else 0.005)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"std": [0.2, 0, 0.2]}, r"dataset.std=\[0.2, 0, 0.2\] must be above 0"),
        ({"mean": [125.3, 123.0, 113.9]}, r"above 1; .* divide by 255: dataset.mean=\[0.4914,0.4824,0.4467\]"),
        ({"std": 58.4}, r"dataset.std=58.4 is above 1"),
        ({"mean": [0.5, 0.5]}, r"one number or three"),
        ({"mean": None}, r"dataset.mean=None must be one number or three"),
        ({"mean": "abc"}, r"dataset.mean=abc must be"),
        ({"mean": [0.5, float("nan"), 0.5]}, r"must be one number or three"),
        ({"mean": [-0.1]}, r"between 0 and 1"),
        ({"interpolation": "cubic"}, r"dataset.interpolation=cubic is not one of nearest, bilinear, bicubic"),
        ({"resize": 0}, r"dataset.resize=0 must be a number of pixels"),
        ({"image_size": "big"}, r"dataset.image_size=big"),
        ({"resize": 24, "image_size": 32}, r"dataset.resize=24 makes images smaller than dataset.image_size=32"),
        ({"margin": 5}, r"dataset.margin=5 must be a fraction"),
        ({"classes": [True, False]}, r"dataset.classes has True, a bool; put the name into quotes"),
        ({"classes": ["a", "b", "a"]}, r"has a twice"),
        ({"classes": 1}, r"dataset.classes=1 must be .* at least two"),
    ],
)
def test_settings_that_cannot_work_are_refused_from_the_configuration_alone(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        image_settings.check(spec("digits", **overrides))


def test_one_mean_and_std_stand_for_three_channels() -> None:
    settings = image_settings.check(spec("digits", mean=0.5, std=[0.25]))
    assert settings.mean == (0.5,) * 3
    assert settings.std == (0.25,) * 3


# ---------------------------------------------------------------- digits


def test_digits_are_two_fixed_stratified_halves_of_scikit_learns(digits: Data) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert (len(digits.train), len(digits.test)) == (898, 899)
    counts = np.bincount(digits.train.labels) - np.bincount(digits.test.labels)
    assert np.abs(counts).max() <= 1
    from qexp.data import builtin

    original = sorted(
        (image.tobytes(), label) for image, label in zip(bunch.images / 16 * 255, bunch.target, strict=True)
    )
    halves = [builtin.digits(split) for split in ("train", "test")]
    ours = [(image, label) for half in halves for image, label in zip(half.images, half.targets, strict=True)]
    expected = sorted((np.round(np.frombuffer(b).reshape(8, 8)).astype(np.uint8).tobytes(), t) for b, t in original)
    assert sorted((image.tobytes(), label) for image, label in ours) == expected


def test_digits_stay_the_same_images_for_good(digits: Data) -> None:
    # Accuracies in the README and cached float models hold for these halves: computed once, qexp 0.1.
    assert digits.test.labels[:12].tolist() == [1, 5, 6, 7, 0, 1, 4, 6, 7, 0, 1, 3]
    assert int(digits.test.pixels().astype(np.int64).sum()) == 215125860


def test_digits_are_uint8_of_32x32_with_three_equal_channels(digits: Data) -> None:
    pixels = digits.test.pixels()
    assert pixels.shape == (899, 3, 32, 32)
    assert pixels.dtype == np.uint8
    assert (pixels[:, 0] == pixels[:, 1]).all()
    assert (pixels[:, 0] == pixels[:, 2]).all()
    assert pixels.max() == 255
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        digits.test.labels[0] = 0


def test_the_mean_and_std_of_digits_are_those_of_its_training_images(digits: Data) -> None:
    scaled = digits.train.pixels() / 255
    assert scaled.mean() == pytest.approx(digits.mean[0], abs=2e-3)
    assert scaled.std() == pytest.approx(digits.std[0], abs=2e-3)


def test_chosen_images_are_those_of_the_whole(digits: Data, tmp_path: Path) -> None:
    lazy = load_data(spec("digits"), tmp_path).train
    chosen = np.array([5, 0, 800])
    np.testing.assert_array_equal(lazy.pixels(chosen), digits.train.pixels()[chosen])


def test_the_digest_follows_images_labels_classes_and_normalisation(digits: Data, tmp_path: Path) -> None:
    assert load_data(spec("digits"), tmp_path).digest == digits.digest
    others = [{"mean": 0.3}, {"interpolation": "nearest"}, {"resize": 40, "image_size": 32}]
    digests = {load_data(spec("digits", **other), tmp_path).digest for other in others}
    assert len(digests) == 3
    assert digits.digest not in digests


# ---------------------------------------------------------------- pixels equal torchvision's


@pytest.mark.parametrize("interpolation", image_settings.INTERPOLATIONS)
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (53, 97), (300, 41), (40, 40), (33, 47)])
@pytest.mark.parametrize(("resize", "crop"), [(40, 32), (37, 33), (40, 40), (None, 33)])
def test_resize_and_crop_equal_torchvision_bit_for_bit(
    interpolation: str, size: tuple[int, int], resize: int | None, crop: int
) -> None:
    from qexp.system.torchvision_import import torchvision

    steps = torchvision.transforms
    mode = steps.InterpolationMode(interpolation)
    picture = noise(size, seed=size[0])
    expected = steps.CenterCrop(crop)(steps.Resize(resize, mode)(picture) if resize else picture)
    ours = preprocessing.to_pixels(picture, image_settings.Preprocessing(resize, crop, interpolation))
    np.testing.assert_array_equal(ours, np.asarray(expected).transpose(2, 0, 1))


def test_normalise_equals_torchvision_bit_for_bit() -> None:
    from qexp.system.torchvision_import import torchvision

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 31, 17), dtype=np.uint8)
    pixels[0, :, :16, :16] = np.arange(256).reshape(16, 16)
    pixels.flags.writeable = False
    steps = torchvision.transforms
    transform = steps.Compose([steps.ToTensor(), steps.Normalize(mean, std)])
    expected = torch.stack([transform(Image.fromarray(p.transpose(1, 2, 0).copy())) for p in pixels])
    ours = normalise(pixels, mean, std)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, expected)
    assert torch.equal(normalise(pixels[::2], mean, std), expected[::2])


# ---------------------------------------------------------------- kinds of images


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # torchvision's loader; qexp's does not warn
def test_kinds_of_image_files_are_decoded_as_torchvision_decodes_them(tmp_path: Path) -> None:
    from qexp.system.torchvision_import import torchvision

    root = tmp_path / "set"
    picture, at = noise(), root / "train" / "many"
    tree(root, {"many": 0, "other": 1}, {"many": 1, "other": 1})
    palette = picture.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    picture.save(at / "a JPG =,é.JPG", "JPEG")
    picture.convert("CMYK").save(at / "cmyk.jpeg")
    picture.convert("L").save(at / "grey.png")
    picture.convert("RGBA").save(at / "alpha.PNG")
    picture.convert("LA").save(at / "la.png")
    picture.convert("1").save(at / "bits.bmp")
    palette.save(at / "palette.png", transparency=bytes(range(16)))
    picture.save(at / "web.webp", lossless=True)
    picture.save(at / "film.gif", save_all=True, append_images=[noise(seed=9)])
    picture.save(at / "pages.tiff", save_all=True, append_images=[noise(seed=9)])
    picture.save(at / "p.ppm")
    exif = Image.Exif()
    exif[preprocessing.EXIF_ORIENTATION] = 6
    picture.save(at / "turned.jpg", exif=exif)
    split = load(root, tmp_path).train
    loader = torchvision.datasets.folder.default_loader
    assert len(split) == 13
    for i, name in enumerate(split.ids):
        np.testing.assert_array_equal(
            split.pixels(np.array([i]))[0], np.asarray(loader(str(root / name))).transpose(2, 0, 1), err_msg=name
        )


def test_an_exif_rotation_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[preprocessing.EXIF_ORIENTATION] = 6
    noise(seed=99).save(folder / "test" / "cat" / "turned.jpg", exif=exif)
    with caplog.at_level(logging.INFO):
        load(folder, tmp_path)
    assert "1 images carry an EXIF rotation, which is not applied" in caplog.text


def test_16_bit_greys_keep_their_high_byte_instead_of_turning_white() -> None:
    values = np.arange(120, dtype=np.uint16).reshape(10, 12) * 546
    pixels = preprocessing.to_pixels(Image.fromarray(values), PLAIN)
    np.testing.assert_array_equal(pixels, np.broadcast_to(values >> 8, (3, 10, 12)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode: str) -> None:
    with pytest.raises(preprocessing.UnusableImage, match="32-bit pixels"):
        preprocessing.to_pixels(Image.new(mode, (8, 8), 3), PLAIN)


@pytest.mark.parametrize(
    ("convert", "channels"),
    [
        (lambda hwc: hwc, 3),
        (lambda hwc: hwc.transpose(2, 0, 1), 3),
        (lambda hwc: hwc.astype(np.int64), 3),
        (lambda hwc: torch.from_numpy(hwc.transpose(2, 0, 1).copy()), 3),
        (lambda hwc: torch.from_numpy(hwc.transpose(2, 0, 1) / np.float32(255)), 3),
        (lambda hwc: hwc.tolist(), 3),
        (lambda hwc: hwc[:, :, 0], 1),
        (lambda hwc: hwc[:, :, :1], 1),
        (lambda hwc: hwc[None, :, :, 0], 1),
        (lambda hwc: torch.from_numpy(hwc[None, :, :, 0].copy()), 1),
        (lambda hwc: np.concatenate([hwc, hwc[:, :, :1]], axis=2), 3),
    ],
)
def test_arrays_and_tensors_of_any_layout_become_the_same_pixels(convert: Callable[..., Any], channels: int) -> None:
    hwc = np.asarray(noise((12, 10)))
    expected = hwc.transpose(2, 0, 1) if channels == 3 else np.broadcast_to(hwc[:, :, 0], (3, 10, 12))
    np.testing.assert_array_equal(preprocessing.to_pixels(convert(hwc), PLAIN), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.randn(3, 8, 8), "not 8-bit pixels; return images before normalisation"),
        (np.full((8, 8, 3), 0.1234, np.float32), "not 8-bit pixels"),
        (np.full((8, 8, 3), 300), "from 300 to 300; pixels are uint8"),
        (np.zeros((5, 8, 8), np.uint8), "its first or last axis must be 1, 3 or 4 channels"),
        (np.zeros((1, 3, 8, 8), np.uint8), "of shape"),
        (np.zeros((0, 8, 3), np.uint8), "of shape"),
        ("cat.jpg", "return a PIL image"),
        (None, "return a PIL image"),
    ],
)
def test_what_is_no_8_bit_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(preprocessing.UnusableImage, match=message):
        preprocessing.to_pixels(image, PLAIN)


# ---------------------------------------------------------------- image folders that work


def test_labels_ids_and_pixels_of_a_folder(folder: Path, tmp_path: Path) -> None:
    data = load(folder, tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.ids[-1] == "train/dog/1.png"
    file = np.asarray(Image.open(folder / data.test.ids[2])).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.test.pixels()[2], file)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Test", "VAL"])
def test_the_evaluation_folder_goes_by_several_names(tmp_path: Path, name: str) -> None:
    assert len(load(tree(tmp_path / "s", {"a": 1, "b": 1}, {"a": 2, "b": 1}, name), tmp_path).test) == 3


def test_of_two_evaluation_folders_test_is_taken_and_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "val").mkdir()
    (folder / "test" / "cat" / "0.png").rename(tmp_path / "x.png")
    for label in ("cat", "dog"):
        (folder / "val" / label).mkdir()
    (tmp_path / "x.png").rename(folder / "val" / "cat" / "0.png")
    with caplog.at_level(logging.INFO):
        assert len(load(folder, tmp_path).test) == 3
    assert "dataset.test=val takes that one" in caplog.text
    assert len(load(folder, tmp_path, test="val").test) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_folders_of_a_split_that_differ_in_case_only_are_refused_until_one_is_named(
    folder: Path, tmp_path: Path, split: str
) -> None:
    name = {"train": "Train", "test": "Val"}[split]
    (folder / split).rename(folder / name)
    expected = load(folder, tmp_path)
    other = name.swapcase()
    shutil.copytree(folder / name, folder / other)
    said = refusal(folder, tmp_path)
    assert f"has folders {min(name, other)} and {max(name, other)}, whose names differ in case only" in said
    assert f"dataset.{split}=<folder>" in said
    assert load(folder, tmp_path, **{split: name}).test.ids == expected.test.ids


def test_classes_missing_empty_or_extra_in_a_split_keep_their_meaning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path / "set", {"b": 2, "c": 1, "d": 0}, {"a": 1, "c": 2, "d": 1})
    with caplog.at_level(logging.INFO):
        data = load(root, tmp_path)
    assert data.classes == ("a", "b", "c", "d")
    assert data.train.labels.tolist() == [1, 1, 2]
    assert data.test.labels.tolist() == [0, 2, 2, 3]
    assert (
        "2 of 4 classes have no images in train (a, d), so a model that is trained on it can't know 2 of the"
        in caplog.text
    )
    assert "1 of 4 classes have no images in test (b)\n" in caplog.text


def test_the_list_of_classes_decides_the_order_of_the_labels(folder: Path, tmp_path: Path) -> None:
    data = load(folder, tmp_path, classes=["dog", "cow", "cat"])
    assert data.classes == ("dog", "cow", "cat")
    assert data.train.labels.tolist() == [2, 2, 2, 0, 0]
    assert data.digest != load(folder, tmp_path).digest


def test_numbered_folders_are_sorted_as_torchvision_sorts_them_and_a_list_sorts_them_as_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = [str(i) for i in range(11)]
    root = tree(tmp_path / "set", dict.fromkeys(numbers, 1), dict.fromkeys(numbers, 1))
    with caplog.at_level(logging.INFO):
        assert load(root, tmp_path).classes == ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    assert "class names are sorted as text (0, 1, 10, 2 ...)" in caplog.text
    in_order = load(root, tmp_path, classes=list(range(11)))
    assert in_order.test.ids[int(np.flatnonzero(in_order.test.labels == 10)[0])] == "test/10/0.png"


def test_litter_is_left_out_and_counted(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load(folder, tmp_path)
    cat = folder / "train" / "cat"
    for name in (".DS_Store", "._0.png", "Thumbs.db", "README.txt", "labels", "notes.npy"):
        (cat / name).write_bytes(b"no image")
    noise(seed=77).save(folder / "train" / "loose.png")
    for split in ("train", "test"):
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            (folder / split / name).mkdir()
            noise(seed=78).save(folder / split / name / "0.png")
    with caplog.at_level(logging.INFO):
        data = load(folder, tmp_path)
    assert data.train.ids == expected.train.ids
    assert data.classes == expected.classes
    left_out = (
        "left out 1 files .db, 1 files .npy, 1 files .txt, 1 files without extension, 2 hidden files, 3 hidden fold"
    )
    assert f"{left_out}ers, 1 images outside of class folders in train/" in caplog.text
    assert f"{folder / 'test'}: left out 3 hidden folders" in caplog.text


def test_nested_folders_links_and_odd_names_are_followed(folder: Path, tmp_path: Path) -> None:
    deep = folder / "train" / "dog" / "a b" / "ü=1,[x]"
    deep.mkdir(parents=True)
    noise(seed=50).save(deep / "é %s {x}.png")
    noise(seed=51).save(tmp_path / "elsewhere.png")
    (folder / "train" / "dog" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "birds").mkdir()
    noise(seed=52).save(tmp_path / "birds" / "b.png")
    (folder / "train" / "bird").symlink_to(tmp_path / "birds", target_is_directory=True)
    data = load(folder, tmp_path)
    assert data.classes == ("bird", "cat", "dog")
    assert {"train/bird/b.png", "train/dog/a b/ü=1,[x]/é %s {x}.png", "train/dog/link.png"} <= set(data.train.ids)
    assert data.train.pixels().shape == (8, 3, 10, 12)


def test_a_file_name_that_is_no_utf_8_gets_a_printable_id(folder: Path, tmp_path: Path) -> None:
    noise(seed=60).save(folder / "test" / "cat" / "x.png")
    (folder / "test" / "cat" / "x.png").rename(folder / "test" / "cat" / os.fsdecode(b"\xff.png"))
    data = load(folder, tmp_path)
    assert data.test.ids[2] == "test/cat/\\xff.png"
    assert data.test.ids[2].isascii()


def test_the_jobs_of_a_sweep_take_a_folder_to_hold_what_the_first_of_them_found(folder: Path, tmp_path: Path) -> None:
    def loaded(sweep: str) -> Data:
        return load_data(spec("imagefolder", root=str(folder)), tmp_path / "cache", sweep)

    (folder / "test" / "cat" / "1.png").rename(folder / "test" / "cat" / os.fsdecode(b"\xff.png"))
    first = loaded("sweep")
    noise(seed=99).save(folder / "test" / "cat" / "later.png")
    again, other, alone = loaded("sweep"), loaded("other sweep"), loaded("")
    assert (again.digest, again.classes) == (first.digest, first.classes)
    for split in ("train", "test"):
        mine, before = getattr(again, split), getattr(first, split)
        assert (mine.ids, mine.source.key) == (before.ids, before.source.key)
        assert np.array_equal(mine.labels, before.labels)
        assert np.array_equal(mine.pixels(np.arange(2)), before.pixels(np.arange(2)))
    assert "test/cat/\\xff.png" in again.test.ids
    assert len(other.test) == len(alone.test) == len(first.test) + 1
    (folder / "train" / "dog" / "0.png").unlink()
    with pytest.raises(InputError, match=r"the image .*dog/0.png can't be read"):
        loaded("sweep").train.pixels(np.arange(5))


def test_a_root_is_relative_to_the_current_folder_and_may_begin_with_a_tilde(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = load(folder, tmp_path).digest
    assert load(Path("set"), tmp_path).digest == expected
    assert load(Path("~/set"), tmp_path).digest == expected


# ---------------------------------------------------------------- image folders that do not work


def test_a_missing_or_empty_root_or_a_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no folder train, but no folders" in refusal(tmp_path / "empty", tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file", tmp_path)


def test_class_folders_without_splits_are_refused_naming_what_is_there(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", {"a": 1}, {"a": 1})
    message = refusal(root / "train", tmp_path)
    assert "has no folder train, but a; it must hold train/<class>/ and test/<class>/" in message


def test_a_folder_without_evaluation_images_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "test").rename(folder / "holdout")
    assert "has no folder test or val or valid or validation, but holdout, train" in refusal(folder, tmp_path)
    assert len(load(folder, tmp_path, test="holdout").test) == 4


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", {"a": 1, "b": 1}, {})
    (root / "val").mkdir()
    noise().save(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert "val has images but no class folders (ILSVRC2012_val_00000001.JPEG)" in refusal(root, tmp_path)


def test_empty_class_folders_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", {"a": 1, "b": 1}, {"a": 0, "b": 0})
    assert "the class folders of test (a, say) hold no images" in refusal(root, tmp_path)


def test_one_class_is_refused(tmp_path: Path) -> None:
    assert "has one class (a)" in refusal(tree(tmp_path / "set", {"a": 3}, {"a": 2}), tmp_path)


def test_a_count_or_list_of_classes_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "dataset.classes=10, and imagefolder has 2" in refusal(folder, tmp_path, classes=10)
    assert "has others too (dog)" in refusal(folder, tmp_path, classes=["cat", "cow"])


@pytest.mark.parametrize("other", ["CAT", "cat ", "ｃat", "cafe\u0301", "hot-dog", "Hot  dog"])
@pytest.mark.parametrize("place", ["test instead", "test too", "train too", "both, empty in test", "both, empty"])
def test_classes_whose_names_a_reader_takes_for_one_are_refused_with_the_names(
    tmp_path: Path, other: str, place: str
) -> None:
    name = "café" if "cafe" in other else "hot_dog" if "dog" in other else "cat"
    train, test = {name: 2, "bee": 1}, {name: 1, "bee": 1}
    where = {"test instead": "train", "train too": "both splits"}.get(place, "both splits")
    there = {"test instead": "test", "test too": "test", "both, empty": "no split"}.get(place, "train")
    if place == "test instead":
        del test[name]
    if place != "train too":
        test[other] = 0 if "empty" in place else 1
    if place not in ("test instead", "test too"):
        train[other] = 0 if place == "both, empty" else 1
    root = tree(tmp_path / "set", train, test)
    said = refusal(root, tmp_path)
    assert f"{name!a} (images in {where})" in said
    assert f"{other!a} (images in {there})" in said
    assert "give them one name" in said
    listed = load(root, tmp_path, classes=[name, other, "bee"])  # whoever lists them means them
    assert listed.classes == (name, other, "bee")


def test_a_users_classes_that_differ_in_case_are_refused_too(user: Callable[..., Data]) -> None:
    with pytest.raises(InputError, match=r"'N' \(images in test\), 'n' \(images in train\)"):
        user("Cased")


@pytest.mark.parametrize("names", [("A", "a"), ("-", "_"), ("café", "cafe\u0301")])
def test_classes_that_both_splits_have_images_of_are_two_whatever_their_names(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    counts = dict.fromkeys(names, 1)
    assert load(tree(tmp_path / "s", counts, counts), tmp_path).classes == tuple(sorted(names))


@pytest.mark.parametrize("link", ["symlink", "hardlink", "folder"])
def test_a_file_in_both_splits_is_refused_by_whatever_link(folder: Path, tmp_path: Path, link: str) -> None:
    new = folder / "train" / "dog" / "z.png"
    if link == "symlink":
        new.symlink_to(folder / "test" / "dog" / "1.png")
    elif link == "hardlink":
        new.hardlink_to(folder / "test" / "dog" / "1.png")
    else:
        (folder / "train" / "more").symlink_to(folder / "test" / "dog", target_is_directory=True)
    message = refusal(folder, tmp_path)
    assert "evaluation images are training images too" in message
    assert "test/dog/" in message


def test_train_and_test_that_are_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "5 of 5 evaluation images are training images too" in refusal(folder, tmp_path, test="train")


def test_copies_of_evaluation_images_among_the_training_images_are_refused(folder: Path, tmp_path: Path) -> None:
    for i in range(2):
        (folder / "train" / "dog" / f"copy{i}.png").write_bytes((folder / "test" / "dog" / f"{i}.png").read_bytes())
    assert "of 7 training images looked at, 2 are evaluation images too" in refusal(folder, tmp_path)


def test_a_few_copies_in_a_large_set_are_let_pass(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", {"a": 30, "b": 30}, {"a": 2, "b": 2})
    (root / "train" / "b" / "copy.png").write_bytes((root / "test" / "b" / "0.png").read_bytes())
    data = load(root, tmp_path)
    assert count_shared(data.train.pixels(), data.test) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_file_is_named(folder: Path, tmp_path: Path, split: str) -> None:
    (folder / split / "dog" / "bad.jpg").touch()
    assert f"{split}/dog/bad.jpg is an empty file" in refusal(folder, tmp_path)


def test_a_truncated_image_and_a_text_are_named(folder: Path, tmp_path: Path) -> None:
    bad = folder / "test" / "dog" / "bad.png"
    noise(seed=5, size=(100, 100)).save(bad)
    bad.write_bytes(bad.read_bytes()[:9000])
    assert f"the image {bad} can't be read (" in refusal(folder, tmp_path)
    bad.write_text("<html>404 not found</html>")
    assert f"the image {bad} can't be read (UnidentifiedImageError" in refusal(folder, tmp_path)


def test_a_bad_training_image_is_named_when_it_is_drawn(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "dog" / "zzz.png").write_text("no image")
    with pytest.raises(InputError, match=r"train/dog/zzz.png can't be read"):
        load(folder, tmp_path).train.pixels()


def test_a_decompression_bomb_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "can't be read (DecompressionBombError" in refusal(folder, tmp_path)


def test_a_broken_link_and_a_link_in_a_circle_are_named(folder: Path, tmp_path: Path) -> None:
    bad = folder / "train" / "dog" / "gone.png"
    bad.symlink_to("nowhere.png")
    assert "gone.png is a link to nowhere.png, which is missing" in refusal(folder, tmp_path)
    bad.unlink()
    (folder / "train" / "dog" / "loop").symlink_to(folder / "train" / "dog", target_is_directory=True)
    assert "is a link to a folder that it lies in" in refusal(folder, tmp_path)


def test_images_of_two_sizes_are_refused_naming_both_and_the_settings(folder: Path, tmp_path: Path) -> None:
    noise((40, 30)).save(folder / "test" / "dog" / "x.png")
    message = refusal(folder, tmp_path)
    assert "test/dog/x.png is 40x30 where others are 12x10" in message
    assert "dataset.image_size" in message
    assert load(folder, tmp_path, resize=10, image_size=10).test.shape == (3, 10, 10)


def test_images_smaller_than_the_crop_are_refused_instead_of_padded(folder: Path, tmp_path: Path) -> None:
    assert "is 12x10, smaller than dataset.image_size=32; set dataset.resize=32" in refusal(
        folder, tmp_path, image_size=32
    )


# ---------------------------------------------------------------- the cache of decoded images


def test_a_second_load_decodes_no_evaluation_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder, tmp_path).test.pixels().copy()
    reads: list[int] = []
    original = data_module.Source.read
    monkeypatch.setattr(
        data_module.Source, "read", lambda self, i, *rest: (reads.append(i), original(self, i, *rest))[1]
    )
    again = load(folder, tmp_path)
    np.testing.assert_array_equal(again.test.pixels(), expected)
    assert len(reads) == 1  # the first one, for its size


def test_images_that_were_drawn_before_are_not_decoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(folder, tmp_path)
    chosen, other = np.array([3, 0, 2]), np.array([2, 0, 3])
    expected = data.train.pixels(chosen).copy()
    np.testing.assert_array_equal(data.train.drawn(chosen), expected)
    again = load(folder, tmp_path)
    monkeypatch.setattr(data_module.Source, "read", lambda self, i, *rest: pytest.fail(f"image {i} is read again"))
    np.testing.assert_array_equal(again.train.drawn(chosen), expected)
    monkeypatch.undo()
    np.testing.assert_array_equal(again.train.drawn(other), expected[::-1])
    assert digest_of(again.train.drawn(chosen)) == digest_of(expected)


def test_an_image_that_changes_under_the_same_name_size_and_time_is_decoded_anew(folder: Path, tmp_path: Path) -> None:
    file = folder / "test" / "cat" / "0.bmp"
    noise(seed=200).save(file)
    os.utime(file, ns=(1, 1))
    before = load(folder, tmp_path)
    size = file.stat().st_size
    noise(seed=201).save(file)
    os.utime(file, ns=(1, 1))
    after = load(folder, tmp_path)
    assert file.stat().st_size == size
    assert not np.array_equal(before.test.pixels(np.array([0])), after.test.pixels(np.array([0])))
    assert before.digest != after.digest


def test_a_damaged_cache_gives_the_right_images(folder: Path, tmp_path: Path) -> None:
    expected = load(folder, tmp_path)
    for entry in (tmp_path / "cache").glob("*.npy"):
        content = bytearray(entry.read_bytes())
        content[-50] ^= 255
        entry.write_bytes(content)
    assert load(folder, tmp_path).digest == expected.digest


def test_the_digest_of_a_folder_is_that_of_its_copy_elsewhere(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    first, second = load(folder, tmp_path), load(tmp_path / "copy", tmp_path)
    assert first.digest == second.digest
    assert first.train.digest == second.train.digest


# ---------------------------------------------------------------- calibration


def calib(batches: int | None, sampling: Sampling, seed: int = 0, batch_size: int = 16) -> Calib:
    return Calib(batches=batches, batch_size=batch_size, sampling=sampling, seed=seed)


@pytest.mark.parametrize("sampling", list(Sampling))
def test_draws_are_nested_distinct_and_repeatable(digits: Data, sampling: Sampling) -> None:
    everything = draw(digits.train, calib(None, sampling))
    assert everything.dtype == np.int64
    assert sorted(everything) == list(range(898))
    for batches in (1, 8, 32, 56):
        np.testing.assert_array_equal(draw(digits.train, calib(batches, sampling)), everything[: 16 * batches])
    np.testing.assert_array_equal(draw(digits.train, calib(2, sampling, batch_size=8)), everything[:16])


def test_seeds_change_random_and_stratified_draws_and_first_takes_the_order_of_the_data(digits: Data) -> None:
    for sampling in (Sampling.random, Sampling.stratified):
        assert set(draw(digits.train, calib(4, sampling))) != set(draw(digits.train, calib(4, sampling, seed=1)))
    np.testing.assert_array_equal(draw(digits.train, calib(2, Sampling.first, seed=3)), np.arange(32))


def test_every_beginning_of_a_stratified_draw_has_equal_classes(digits: Data) -> None:
    drawn = digits.train.labels[draw(digits.train, calib(None, Sampling.stratified, seed=5))]
    for n in range(1, 871):  # the smallest class has 87 images
        counts = np.bincount(drawn[:n], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_a_stratified_draw_of_unequal_classes_takes_the_small_ones_whole() -> None:
    labels = np.repeat([0, 1, 3], [50, 2, 5])
    drawn = labels[calibration_images._order_stratified(labels, 0)]
    assert np.bincount(drawn[:9]).tolist() == [4, 2, 0, 3] or np.bincount(drawn[:9]).tolist() == [3, 2, 0, 4]
    assert (drawn[12:] == 0).all()


def test_too_many_batches_are_refused_with_how_many_there_are(digits: Data) -> None:
    message = (
        r"calib.batches=100000 asks for 1600000 images; digits has 898 to calibrate with: at most 57 batches of 16, or"
        r" calib.batches=null for all\."
    )
    with pytest.raises(InputError, match=message):
        draw(digits.train, calib(100000, Sampling.random))
    assert len(draw(digits.train, calib(56, Sampling.random))) == 896


@pytest.mark.parametrize(("batches", "size", "most"), [(57, 16, 57), (29, 32, 29), (1, 1000, 1), (2, 449, 2)])
def test_the_last_batch_takes_what_is_left(digits: Data, batches: int, size: int, most: int) -> None:
    everything = draw(digits.train, calib(None, Sampling.random))
    np.testing.assert_array_equal(draw(digits.train, calib(batches, Sampling.random, batch_size=size)), everything)
    with pytest.raises(InputError, match=f"at most {most} batches of {size}, or"):
        draw(digits.train, calib(batches + 1, Sampling.random, batch_size=size))


def test_no_evaluation_image_of_digits_is_drawn(digits: Data) -> None:
    assert count_shared(digits.train.pixels(draw(digits.train, calib(None, Sampling.random))), digits.test) == 0
    assert count_shared(digits.test.pixels(np.array([3, 4])), digits.test) == 2


def test_the_digest_of_images_follows_values_order_shape_and_dtype() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    others = [pixels[::-1], pixels.reshape(4, 3, 2, 1), pixels.astype(np.int8), pixels + 1]
    assert len({digest_of(pixels), *(digest_of(other) for other in others)}) == 5
    assert digest_of(pixels) == digest_of(pixels.copy(order="F"))


# ---------------------------------------------------------------- users' data sets

USER = """
import random
import shutil
import numpy as np
import torch
from PIL import Image

class Base:
    count = 40
    def __init__(self, split, scale=1):
        self.rng = np.random.default_rng(1 if split == "train" else 2)
        self.images = self.rng.integers(0, 256, (self.count, 8, 8, 3), dtype=np.uint8)
        self.answers = np.arange(self.count) % 4
        self.split, self.scale = split, scale
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        return self.images[i], int(self.answers[i])

class Named(Base):
    classes = ["n", "e", "s", "w"]
class Listed(Base):
    @property
    def targets(self):
        return torch.from_numpy(self.answers)
class Shifted(Listed):  # as by a target_transform
    def __getitem__(self, i):
        return self.images[i], (int(self.answers[i]) + 1) % 4
class Liar(Listed):
    def __getitem__(self, i):
        return self.images[i], 3 if i == 6 else int(self.answers[i])
class Rooted(Base):
    def __init__(self, root, split):
        super().__init__(split)
        self.root = root
class PerSplit(Base):
    def __init__(self, split):
        super().__init__(split)
        self.classes = ["a", "b", "c", "d"] if split == "train" else ["b", "c", "d", "e"]
class Cased(Base):
    def __init__(self, split):
        super().__init__(split)
        self.classes = ["n", "e", "s", "w"] if split == "train" else ["N", "e", "s", "w"]
class OneBased(Base):
    def __getitem__(self, i):
        return self.images[i], int(self.answers[i]) + 1
class Negative(Base):
    def __getitem__(self, i):
        return self.images[i], int(self.answers[i]) - 1
class OneHot(Base):
    def __getitem__(self, i):
        return self.images[i], np.eye(4)[self.answers[i]]
class Floats(Base):
    def __getitem__(self, i):
        return self.images[i], float(self.answers[i])
class Texts(Base):
    def __getitem__(self, i):
        return self.images[i], "cat"
class Dicts(Base):
    def __getitem__(self, i):
        return {"image": self.images[i], "label": 1}
class Triples(Base):
    def __getitem__(self, i):
        return self.images[i], 1, "name"
class Normalised(Base):
    def __getitem__(self, i):
        return torch.randn(3, 8, 8), 1
class Augmented(Base):
    def __getitem__(self, i):
        shift = random.randrange(8)
        return np.roll(self.images[i], shift, axis=0), int(self.answers[i])
class SameImages(Base):
    def __init__(self, split):
        super().__init__("train")
class Crashing(Base):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("disk on fire")
        return self.images[i], int(self.answers[i])
class Empty(Base):
    count = 0
class Raising:
    def __init__(self, split):
        raise RuntimeError("no licence")
class TensorLabels(Base):
    def __getitem__(self, i):
        return torch.from_numpy(self.images[i].transpose(2, 0, 1)), torch.tensor([self.answers[i]])
class Stamped(Base):
    fingerprint = "v1"
    reads = 0
    def __getitem__(self, i):
        Stamped.reads += 1
        return super().__getitem__(i)
def loader(split):
    return torch.utils.data.DataLoader(Base(split))
def stream(split):
    return iter(Base(split))
def both(split):
    return Base("train"), Base("test")
def resplit(split):
    whole = Base("train")
    whole.count = len(whole.images)
    first, second = torch.utils.data.random_split(whole, [20, 20])
    return first if split == "train" else second
def no_split(scale):
    return Base("train")
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Data]:
    (tmp_path / "mysets.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mysets", raising=False)

    def make(name: str, **overrides: Any) -> Data:
        return load_data(spec("custom", _target_=f"mysets.{name}", **overrides), tmp_path / "cache")

    return make


def test_a_users_data_set_gives_its_images_labels_and_classes(user: Callable[..., Data]) -> None:
    data = user("Base")
    rng = np.random.default_rng(2)
    expected = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.test.pixels(), expected)
    assert data.classes == ("0", "1", "2", "3")
    assert data.test.labels.tolist() == [i % 4 for i in range(40)]
    assert data.test.ids[:2] == ("0", "1")
    assert user("Named").classes == ("n", "e", "s", "w")
    assert user("Base", classes=6).classes == ("0", "1", "2", "3", "4", "5")
    assert user("Base", classes=["p", "q", "r", "s"]).classes == ("p", "q", "r", "s")


@pytest.mark.parametrize("name", ["Listed", "TensorLabels"])
def test_labels_may_be_listed_or_tensors(user: Callable[..., Data], name: str) -> None:
    np.testing.assert_array_equal(user(name).test.labels, user("Base").test.labels)


def test_where_listed_labels_and_items_disagree_the_items_are_right_or_it_is_refused(
    user: Callable[..., Data],
) -> None:
    assert user("Shifted").test.labels.tolist()[:5] == [1, 2, 3, 0, 1]
    with pytest.raises(InputError, match=r"image 6 of dataset Liar \(train\) has label 3, where .* has 2"):
        user("Liar", classes=4)


def test_class_names_that_differ_between_splits_are_matched_by_name(user: Callable[..., Data]) -> None:
    data = user("PerSplit")
    assert data.classes == ("a", "b", "c", "d", "e")
    assert data.train.labels.tolist()[:4] == [0, 1, 2, 3]
    assert data.test.labels.tolist()[:4] == [1, 2, 3, 4]


def test_root_and_own_arguments_reach_the_callable(user: Callable[..., Data], tmp_path: Path) -> None:
    assert user("Rooted", root=str(tmp_path)).train.source.dataset.root == str(tmp_path)
    assert user("Base", scale=3).train.source.dataset.scale == 3
    with pytest.raises(ConfigError, match=r"dataset.scael=3: .* takes scale"):
        user("Base", scael=3)
    with pytest.raises(ConfigError, match=r"dataset.root="):
        user("Base", root="here")
    with pytest.raises(ConfigError, match=r"dataset\.split"):
        user("Base", split="train")


def test_a_fingerprint_lets_a_users_images_be_kept(user: Callable[..., Data]) -> None:
    first = user("Stamped")
    kind = type(first.test.source.dataset)
    before = kind.reads
    assert user("Stamped").digest == first.digest == user("Base").digest
    assert kind.reads - before < 40
    assert user("Stamped", scale=2).digest == first.digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OneBased", r"labels from 1 to 4, and the first class is 0; subtract 1, or set dataset.classes=5"),
        ("Negative", r"labels from -1 to 2 for split=train, where 3 classes need 0 to 2"),
        ("OneHot", r"image 0 .* has as its label an array of shape \(4,\); return an integer.*argmax"),
        ("Floats", r"has as its label 0.0, a float"),
        ("Texts", r"has as its label 'cat', a str"),
        ("Dicts", r"is a dict with the keys image, label; items must be pairs"),
        ("Triples", r"is a tuple of 3; items must be pairs"),
        ("Normalised", r"image 0 of dataset Normalised \(train\) has values .* before normalisation"),
        ("Augmented", r"another image each time .* augmentation is qexp's"),
        ("SameImages", r"of 40 training images looked at, 40 are evaluation images too"),
        ("resplit", r"training images looked at, \d+ are evaluation images too"),
        ("Crashing", r"image 7 of dataset Crashing \(train\) can't be read \(OSError: disk on fire\)"),
        ("Empty", r"returns a data set without images for split=train"),
        ("Raising", r"split=train fails with RuntimeError: no licence"),
        ("loader", r"returns a DataLoader; return a map-style data set"),
        ("stream", r"returns a iterator; return a map-style data set|returns a generator"),
        ("both", r"image 0 of dataset both \(train\) is a Base; items must be pairs"),
        ("no_split", r"must take the argument split"),
        ("Missing", r"mysets has no Missing"),
    ],
)
def test_a_users_data_set_that_cannot_work_is_refused_in_a_sentence(
    user: Callable[..., Data], name: str, message: str
) -> None:
    with pytest.raises((InputError, ConfigError), match=message) as caught:
        user(name)
    assert "\n" not in str(caught.value)


def test_one_based_labels_with_a_count_are_refused_with_a_hint(user: Callable[..., Data]) -> None:
    with pytest.raises(InputError, match=r"labels from 1 to 4 .* where 4 classes need 0 to 3, so subtract 1\."):
        user("OneBased", classes=4)
    assert user("OneBased", classes=5).test.labels.max() == 4


# ---------------------------------------------------------------- torchvision's data sets


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_without_network_and_copy_a_download_is_refused_quickly_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    root = tmp_path / "root"
    start = time.monotonic()
    with pytest.raises(
        InputError, match=rf"is not under dataset.root={root}, and can't be downloaded \(.*refused"
    ) as caught:
        load_data(spec(name, root=str(root)), tmp_path / "cache")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert not [file for file in root.rglob("*") if file.is_file() and file.name != ".download.lock"]


def _idx(values: np.ndarray) -> bytes:
    """The file format of MNIST."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_a_copy_of_mnist_under_root_is_used_and_resized(tmp_path: Path, name: str, kind: str) -> None:
    raw = tmp_path / kind / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 30)):
        grey = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(_idx(grey))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx((np.arange(count) % 10).astype(np.uint8)))
    data = load_data(spec(name, root=str(tmp_path)), tmp_path / "cache")
    assert data.test.pixels().shape == (30, 3, 32, 32)
    assert len(data.train) == 60
    assert len(data.classes) == 10
    expected = np.asarray(Image.fromarray(grey[4]).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(data.test.pixels()[4], np.broadcast_to(expected, (3, 32, 32)))
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"\0\0")
    with pytest.raises(InputError, match=rf"the copy of {kind} in .* can't be read .*; delete that folder"):
        load_data(spec(name, root=str(tmp_path)), tmp_path / "cache")


def test_no_bar_and_no_line_is_written_where_stderr_is_no_terminal(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(folder, tmp_path).train.pixels()
    assert capfd.readouterr() == ("", "")
