"""PyTorch's eager mode with weights and images in channels-last memory format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qexp.config import schema
from qexp.config.schema import Engine
from qexp.runtimes.base import Loaded
from qexp.runtimes.eager import Eager


class EagerChannelsLast(Eager):
    name = schema.RuntimeName.eager_channels_last

    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        loaded = super().load(path, structure, engine)
        loaded.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        return replace(loaded, channels_last=True)
