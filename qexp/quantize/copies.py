"""Copies of a model: the one that each flow begins with, and those that its steps make of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def evaluation_copy(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode whose weights and paddings are plain values.

    Weight and spectral norm compute a layer's weight anew at each call, by a hook or by a class of their own, and
    torch.ao neither fuses nor quantizes such layers; nor does it take a padding that is called "same".
    """
    module = copy.deepcopy(module).eval()
    for part in list(module.modules()):
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)
        if parametrize.is_parametrized(part):
            _settle(part)
        if isinstance(part, _ConvNd) and isinstance(part.padding, str):
            number_padding(part)
    return module.requires_grad_(False)


def sharing_copy(module: nn.Module) -> nn.Module:
    """A deep copy but for the parameters, which are the same objects: for steps that read weights and change none."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _settle(part: nn.Module) -> None:
    """Give a parametrised module back its own class, with the values that it computed.

    torch's remove_parametrizations takes the property off the class, which the copy shares with the model.
    """
    parametrizations = part._modules["parametrizations"]
    assert isinstance(parametrizations, nn.ModuleDict)
    values = {name: getattr(part, name).detach().clone() for name in parametrizations}
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part._modules["parametrizations"]
    for name, value in values.items():
        part.register_parameter(name, nn.Parameter(value))


def number_padding(conv: _ConvNd) -> bool:
    """Write a padding that is a word as numbers, in place, if it is the same at both ends; whether it was."""
    ends = list(conv._reversed_padding_repeated_twice)  # two for each dimension, the last first
    if ends[::2] != ends[1::2]:
        return False
    padding: Any = tuple(ends[::2][::-1])
    conv.padding = padding
    return True
