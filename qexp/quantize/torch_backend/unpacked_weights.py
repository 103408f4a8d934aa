"""Weights of convolutions that AOTInductor leaves unpacked where the number of images is open (torch 2.13).

oneDNN's kernels take weights in layouts of their own. Where the program gives a convolution's input a shape, torch
packs its weight when it compiles; where the number of images is open, it packs an INT8 weight for a shape that it makes
up, and an FP32 weight not at all, so that each call packs them anew. ResNet-18 at 32x32, one image, one thread, Zen 4:
1.9 in place of 0.7 ms in INT8, 12 in place of 2.1 ms in FP32. The layout that a kernel takes depends on the processor
and the layer, and hardly on the number of images; where it does, oneDNN packs again, and the answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx


@contextmanager
def packed_for_one_image() -> Iterator[dict[str, Any]]:
    """In this context AOTInductor packs weights for one image, if it is given the options that this returns.

    FP32 weights of a program with transposed convolutions, which torch can't pack for an open number, stay as they are.
    """
    from torch._inductor.fx_passes import mkldnn_fusion

    is_open, operations = mkldnn_fusion.has_free_symbols, mkldnn_fusion.CpuMkldnnDeviceOp
    pack, packs = operations.pack_conv_weight, True

    def before_packing(graph: fx.Graph) -> None:
        nonlocal packs
        convolutions = [node for node in graph.nodes if node.target is torch.ops.aten.convolution.default]
        packs = not any(node.args[6] for node in convolutions)  # transposed
        _note_shapes_of_one_image(graph)

    def open_sizes(sizes: Any) -> bool:
        # Shapes are those of convolutions; for linear layers it asks of one number, and packs for an example of it.
        return bool(is_open(sizes)) and not (packs and isinstance(sizes, torch.Size))

    def pack_for_one(self: Any, graph: Any, transposed: bool, weight: Any, settings: Any, size: Sequence[Any]) -> Any:
        return pack(self, graph, transposed, weight, settings, _of_one_image(size))

    asked = mock.patch.object(mkldnn_fusion, "has_free_symbols", open_sizes)
    with asked, mock.patch.object(operations, "pack_conv_weight", pack_for_one):
        yield {"joint_custom_post_pass": before_packing}


def _note_shapes_of_one_image(graph: fx.Graph) -> None:
    """Note shapes of one image where those of a graph's tensors are open, for the packing of INT8 weights, which is all
    that reads this note."""
    for node in graph.nodes:
        noted = node.meta.get("tensor_meta")
        if hasattr(noted, "shape"):
            node.meta["tensor_meta"] = noted._replace(shape=torch.Size(_of_one_image(noted.shape)))


def _of_one_image(sizes: Sequence[Any]) -> list[int]:
    return [size if isinstance(size, int) else 1 for size in sizes]
