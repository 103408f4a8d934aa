"""Copies of a model: the one that each flow starts from, and those that its steps make."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qexp.models.unwrap import unwrap
from qexp.quantize.graph.hooks import attached

_BATCH_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.InstanceNorm1d: nn.BatchNorm1d,
    nn.InstanceNorm2d: nn.BatchNorm2d,
    nn.InstanceNorm3d: nn.BatchNorm3d,
}


def evaluation_copy(module: nn.Module, example: Tensor) -> nn.Module:
    """Return a deep copy in evaluation mode whose weights and paddings are plain values and whose layers are plain.

    Pruning, weight and spectral norm and every other parametrization compute a layer's weight in each call, by a hook
    or by a class of their own, and torch.ao neither fuses nor quantizes such layers. It doesn't support padding="same",
    a SyncBatchNorm or an InstanceNorm with running statistics, either, which are BatchNorms in evaluation (torch's INT8
    InstanceNorm uses the statistics of each image even then). Wrappers around modules are removed, and so are hooks on
    state_dicts, which may not support INT8 layers.

    example: float32 [n, 3, H, W], to find the number of dimensions of a SyncBatchNorm's input.
    """
    module = unwrap(copy.deepcopy(module, _computed(module))).eval()
    for part in list(module.modules()):
        # The last comes first, since it may compute an input of an earlier one.
        for hook in reversed(list(part._forward_pre_hooks.values())):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, hook._tensor_name)
        if parametrize.is_parametrized(part):
            _settle(part)
        if isinstance(part, _ConvNd) and isinstance(part.padding, str):
            number_padding(part)
        if isinstance(part, _InstanceNorm) and part.track_running_stats:
            _make_batch_norm(part)
        for hooks in (part._state_dict_hooks, part._state_dict_pre_hooks):
            hooks.clear()
        for hooks in (part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks):
            hooks.clear()
    _make_plain_norms(module, example)
    return module.requires_grad_(False)


def sharing_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy that shares the parameters, for steps that read weights and change none."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def by_modules(module: nn.Module) -> nn.Module:
    """Let transformer layers call their linear layers, in place, and return the module.

    torch's kernel for a whole transformer layer reads their weights instead, so that INT8 layers couldn't replace them.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # the kernel is for these two activations
    return module


@contextmanager
def each_once(module: nn.Module) -> Iterator[None]:
    """In this context every module within `module` has one name, the first. Afterwards it, or its replacement, has all
    its names again.

    torch.ao changes modules name by name, and would take a module with several names for several modules.
    """
    first: dict[int, str] = {}
    named = [(name, id(part)) for name, part in module.named_modules(remove_duplicate=False)]
    others = {name: first[part] for name, part in named if first.setdefault(part, name) != name}
    # Submodules of a module with several names come with it.
    others = {name: one for name, one in others.items() if name.rpartition(".")[0] not in others}
    for name in others:
        module.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        for name, one in others.items():
            module.set_submodule(name, module.get_submodule(one))


def _computed(module: nn.Module) -> dict[int, Any]:
    """Return a `memo` for deepcopy with copies of tensors that it can't copy itself.

    These were computed from parameters, and hooks store them as plain attributes until the next call.
    """
    found: dict[int, Any] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            found[id(value)] = value.detach().clone()
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)
        elif isinstance(value, dict):
            look(list(value.values()))

    for part in module.modules():
        look({name: value for name, value in vars(part).items() if name not in ("_modules", "_parameters")})
    return found


def _settle(part: nn.Module) -> None:
    """Give a parametrised module back its own class, with the values that it computed.

    torch's remove_parametrizations takes the property off the class, which the copy shares with the model.
    """
    parametrizations = part._modules["parametrizations"]
    assert isinstance(parametrizations, nn.ModuleDict)
    values = {name: getattr(part, name).detach().clone() for name in parametrizations}
    buffers = [name for name in parametrizations if not list(parametrizations[name].parameters(recurse=False))]
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part._modules["parametrizations"]
    for name, value in values.items():
        if name in buffers:
            part.register_buffer(name, value)
        else:
            part.register_parameter(name, nn.Parameter(value))


def _make_batch_norm(norm: _InstanceNorm) -> None:
    """Make an InstanceNorm the BatchNorm with its statistics, in place, unless its class overrides forward."""
    for base, kind in _INSTANCE_NORMS.items():
        if isinstance(norm, base) and type(norm).forward is _InstanceNorm.forward:
            as_module: nn.Module = norm
            as_module.__class__ = kind


def _make_plain_norms(module: nn.Module, example: Tensor) -> None:
    """Make each SyncBatchNorm the BatchNorm for its input's number of dimensions, in place."""
    synced = [
        part
        for part in module.modules()
        if isinstance(part, nn.SyncBatchNorm) and type(part).forward is nn.SyncBatchNorm.forward
    ]
    if not synced:
        return
    kinds: dict[int, type[nn.Module]] = {}

    def look(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kinds[id(part)] = _BATCH_NORMS[inputs[0].ndim]

    with torch.inference_mode(), attached(part.register_forward_pre_hook(look) for part in synced):
        module(example[:1])
    for part in synced:
        part.__class__ = kinds.get(id(part), nn.BatchNorm2d)  # type: ignore[assignment]


def number_padding(conv: _ConvNd) -> bool:
    """Write a padding that is a word as numbers, in place. Return False, without a change, if it isn't symmetric."""
    ends = list(conv._reversed_padding_repeated_twice)  # two for each dimension, the last first
    if ends[::2] != ends[1::2]:
        return False
    padding: Any = tuple(ends[::2][::-1])
    conv.padding = padding
    return True
