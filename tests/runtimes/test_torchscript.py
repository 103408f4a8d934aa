"""TorchScript of graphs that torch.export made: the other models are traced as modules in the other tests."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qexp.config.schema import RuntimeName
from qexp.errors import RunError
from qexp.quantize.graph.exported import exported
from qexp.runtimes import RUNTIMES
from tests.helpers import networks


class Viewed(nn.Module):
    """Logits of maps whose shape is read from the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        count = images.size(0)
        logits: Tensor = self.fc(self.pool(self.conv(images)).view(count, -1))
        return logits


@pytest.mark.parametrize(
    "name", ["Viewed", "EfficientChannelAttention", "CosineClassifier", "SpatialPyramid", "Coordinates"]
)
def test_a_program_takes_any_number_of_images(name: str, tmp_path: Path) -> None:
    net = Viewed().eval() if name == "Viewed" else networks.built(name)
    program, batch = exported(net, networks.images(2)), networks.images(5)
    runtime, path = RUNTIMES[RuntimeName.torchscript], tmp_path / "fp32.pt"
    loaded = runtime.load(runtime.export(program, batch, path), lambda: net, None)
    with torch.inference_mode():
        expected = net(batch)
        for count in (1, 2, 5):
            torch.testing.assert_close(loaded(batch[:count]), expected[:count], rtol=1e-4, atol=1e-4)


def test_one_that_a_trace_cannot_follow_is_refused_in_a_sentence(tmp_path: Path) -> None:
    program = exported(networks.built("ConditionalConv"), networks.images(2))  # one group for each image
    with pytest.raises(RunError, match=r"^torchscript can't trace the model: Given groups=2, .*out of runtimes$"):
        RUNTIMES[RuntimeName.torchscript].export(program, networks.images(2), tmp_path / "fp32.pt")
