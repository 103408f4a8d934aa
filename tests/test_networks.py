"""Many networks that were written for nothing but to be quantized, each through the flows."""

from __future__ import annotations

import pytest
import torch
from networks import CLASSES, NETWORKS, built, images


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_tells_images_apart_and_knows_nothing_of_batches(name: str) -> None:
    net, batch = built(name), images(16)
    with torch.inference_mode():
        logits, few = net(batch), net(batch[:3])
    assert logits.shape == (16, CLASSES)
    assert (few - logits[:3]).abs().max() < 1e-4 * logits.abs().max()
    assert logits.std(dim=0).mean() > 0.02 * logits.abs().mean()
