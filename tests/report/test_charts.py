"""Charts: what is in them, whatever the number of layers; nobody's pyplot is touched."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qexp.records import Fidelity
from qexp.report import charts


def rows(count: int) -> list[Fidelity]:
    return [
        Fidelity(
            f"features.{i}.block.{i % 5}.conv", "conv", 30 - 20 * i / count, 35 + i % 7, 40.0, 10.0 ** -(i % 9), 0.1
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 5, 21, 160])
def test_a_row_for_each_layer_from_the_top_and_a_readable_png(count: int, tmp_path: Path) -> None:
    figure = charts.layers(rows(count), "tiny · digits · per_channel")
    noise, clipped = figure.axes
    assert [label.get_text() for label in noise.get_yticklabels()] == [
        charts.shortened(row.name) for row in rows(count)
    ]
    bottom, top = noise.get_ylim()
    assert top < 0 < count - 1 < bottom or count == 1
    assert len(clipped.patches) == count
    assert clipped.patches[-1].get_width() == pytest.approx(rows(count)[-1].clipped * 100)
    charts.save(figure, tmp_path / "layers.png")
    with Image.open(tmp_path / "layers.png") as image:
        assert image.format == "PNG"
        assert image.width >= 1400
        # A label needs some ten pixels to be read.
        assert image.height >= 14 * count
    # Nothing is cut off: the outermost pixels are paper.
    pixels = np.asarray(Image.open(tmp_path / "layers.png").convert("L"))
    assert min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) == 255


def test_the_layers_that_add_most_noise_stand_out() -> None:
    figure = charts.layers(
        [Fidelity(name, "conv", 20.0, own, None, 0.0, 1.0) for name, own in (("a", 30.0), ("b", 9.0), ("c", math.inf))],
        "",
    )
    labels = figure.axes[0].get_yticklabels()
    # A quarter of the layers at most, and one at least.
    assert [label.get_fontweight() == "bold" for label in labels] == [False, True, False]
    assert labels[1].get_color() != labels[0].get_color()


def test_what_is_not_finite_or_unknown_has_no_marker(tmp_path: Path) -> None:
    odd = [
        Fidelity("equal", "conv", math.inf, math.inf, math.inf, 0.0, 1.0),
        Fidelity("unknown", "other", -3.0, None, None, 1.0, 1.0),
        Fidelity("nothing", "conv", -math.inf, -math.inf, None, 0.0, 1.0),
    ]
    figure = charts.layers(odd, "odd")
    low, high = figure.axes[0].get_xlim()
    assert low < -3 < high < 100
    charts.save(figure, tmp_path / "odd.png")
    assert (tmp_path / "odd.png").stat().st_size > 0


def test_long_names_lose_their_middle() -> None:
    assert charts.shortened("features.0") == "features.0"
    long = "trunk_output.block1.block1-0.f.se.scale_activation"
    assert charts.shortened(long) == "trunk_output.block1….se.scale_activation"
    assert len(charts.shortened(long)) == 40


def test_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        charts.layers([], "")


def test_neither_pyplot_nor_torch_is_touched() -> None:
    code = "import sys, qexp.report.charts; sys.exit(not {'matplotlib.pyplot', 'torch'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
