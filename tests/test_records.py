"""Values that are written and read back."""

from __future__ import annotations

import io

import numpy as np

from qexp.records import Predictions, Top1, same_as_text, same_from_text


def test_predicted_classes_survive_their_file() -> None:
    shared, other = np.array([0, 1], np.int32), np.array([1, 1], np.int32)
    labels, images = np.array([0, 0], np.int32), np.array([1])
    int8 = {"eager": shared, "inductor": other, "torchscript": shared}
    same = (("eager", "torchscript"), ("inductor",))
    for target in (None, other[1:]):
        top1 = Top1(labels, shared, int8, ("cat", "dog"), None if target is None else images, target)
        file = io.BytesIO()
        np.savez(file, **top1.arrays())
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            assert sum(name.startswith("int8_") for name in arrays) == 2
            back = Top1.from_arrays(dict(arrays), same_from_text(same_as_text(same)))
        assert np.array_equal(back.labels, labels)
        assert np.array_equal(back.fp32, shared)
        assert back.int8["torchscript"] is back.int8["eager"]
        assert {name: list(classes) for name, classes in back.int8.items()} == {k: list(v) for k, v in int8.items()}
        assert back.classes == ("cat", "dog")
        assert back.target is None if target is None else np.array_equal(back.target, target)
        assert back.target_images is None if target is None else np.array_equal(back.target_images, images)


def test_groups_of_runtimes_are_written_as_a_tag() -> None:
    assert same_as_text((("eager", "torchscript"), ("inductor",))) == "eager torchscript; inductor"
    assert same_from_text("eager torchscript; inductor") == (("eager", "torchscript"), ("inductor",))
    assert same_from_text("") == ()


def test_the_first_of_equal_logits_is_the_predicted_class() -> None:
    predictions = Predictions(np.array([[1, 1, 0], [0, 2, 1]], np.float32), np.array([0, 2]), ("a", "b"))
    assert predictions.top1.tolist() == [0, 1]
    assert predictions.top1.dtype == np.int32
    assert predictions.correct.tolist() == [True, False]
