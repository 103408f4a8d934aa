"""Weights are packed for one image while AOTInductor compiles, but for FP32 ones beside transposed convolutions.

That packages then answer the same for any number of images is tested in tests/runtimes/test_inductor.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.fx_passes import mkldnn_fusion
from torch.export import Dim, export

from qexp.quantize.torch_backend.unpacked_weights import packed_for_one_image


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_convolutions_are_known_in_the_context_unless_one_is_transposed(transposed: bool) -> None:
    net: nn.Module = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 4, 3)
    exported = export(net.eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch")},))
    graph = exported.run_decompositions().graph_module.graph
    images = next(node for node in graph.nodes if node.op == "placeholder" and node.meta["val"].ndim == 4
                  and not isinstance(node.meta["val"].shape[0], int))  # fmt: skip
    batch, shape = images.meta["val"].shape[0], images.meta["val"].shape
    asked, packs = mkldnn_fusion.has_free_symbols, mkldnn_fusion.CpuMkldnnDeviceOp.pack_conv_weight
    with packed_for_one_image() as options:
        options["joint_custom_post_pass"](graph)
        assert mkldnn_fusion.has_free_symbols(shape) is transposed
        assert mkldnn_fusion.has_free_symbols(batch) is True  # a linear layer's
    assert mkldnn_fusion.has_free_symbols is asked
    assert mkldnn_fusion.CpuMkldnnDeviceOp.pack_conv_weight is packs
    noted = [node.meta["tensor_meta"].shape for node in graph.nodes if "tensor_meta" in node.meta]
    assert all(isinstance(size, int) for sizes in noted for size in sizes)
