"""The ready studies: what they claim to be."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.ao.quantization import get_default_qconfig

from qexp.config.schema import Config, Engine
from qexp.quantize.torch_backend.observers import torch_qconfig

# Of a layer's output, and a weight: both with a few values far out, as activations after a ReLU have them.
GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(4, 8, 6, 6, generator=GENERATOR).relu() ** 2
WEIGHT = torch.randn(8, 3, 3, 3, generator=GENERATOR)


@pytest.mark.parametrize("engine", list(Engine))
def test_pytorch_default_is_exactly_what_torch_gives_for_the_engine(
    composed: Callable[..., Config], engine: Engine
) -> None:
    config = composed("experiment=pytorch_default", f"engine={engine}")
    ours = torch_qconfig(config.qconfig, config.observer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reduce_range.*")
        warnings.filterwarnings("ignore", message=".*Default qconfig of oneDNN.*")
        theirs = get_default_qconfig(str(engine))
        for make, other, tensor in (
            (ours.activation, theirs.activation, VALUES),
            (ours.weight, theirs.weight, WEIGHT),
        ):
            observer, expected = make(), other()
            assert isinstance(observer, type(expected))
            observer(tensor)
            expected(tensor)
            for mine, torchs in zip(observer.calculate_qparams(), expected.calculate_qparams(), strict=True):
                assert torch.equal(mine, torchs)
            assert (observer.dtype, observer.qscheme) == (expected.dtype, expected.qscheme)
    assert config.qconfig.range_after_clamp is False
