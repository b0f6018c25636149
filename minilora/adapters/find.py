"""The contents of a model: its adapter layers, its own modules, and how many parameters they have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from minilora.adapter import base_modules, known_layers, walk
from minilora.errors import check_types
from minilora.lora import AdapterWrapper, Linear
from minilora.models.bitsandbytes import describe
from minilora.nf4 import NF4Linear


def places_of(model: nn.Module, name: str) -> dict[str, AdapterWrapper]:
    """Return the wrappers of one adapter by the path of the module; raise a TargetError if there are none."""
    return {layer.path: layer for layer in known_layers(model, name) if name in layer.configs}


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the linears by path, adapted or not, without subclasses of `nn.Linear`, which may compute anything."""
    modules: dict[str, Any] = base_modules(model)
    return {path: module for path, module in modules.items() if path and type(module) in (nn.Linear, NF4Linear)}


def base_held(model: nn.Module) -> dict[str, Any]:
    """Describe how the base's weights are held, dense or quantized, by the names of the flags."""
    return describe(linear_layers(model), head_path(model))


def head_path(model: nn.Module) -> str | None:
    """Return the path of the output head, from `get_output_embeddings`, or None."""
    return _path_of(model, "get_output_embeddings")


def embedding_path(model: nn.Module) -> str | None:
    """Return the path of the input embedding, from `get_input_embeddings`, or None."""
    return _path_of(model, "get_input_embeddings")


def _path_of(model: nn.Module, method: str) -> str | None:
    find = getattr(model, method, None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # transformers raises it for models without embeddings
        found = None
    return next((path for path, module in walk(model) if module is found), None) if found is not None else None


class ParameterCount(NamedTuple):
    """The number of trainable parameters, and of all."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and all parameters, a shared one once; a packed weight counts as the dense one it encodes."""
    check_types(count_parameters, locals())
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    parts = {id(part) for linear in packed for part in linear.parts}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if id(p) not in parts]
    sizes += [(linear.out_features * linear.in_features, False) for linear in packed]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def get_base_layer(module: nn.Module) -> nn.Module:
    """Return the module of the model itself, without the wrappers around it."""
    while isinstance(module, AdapterWrapper):
        module = module.base
    return module


def shallow_copy(module: nn.Module, own: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a copy of a module that shares its tensors, except for its `own` parameters: frozen, or None for none."""
    held = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in held})
    for name, tensor in own.items():
        where, _, last = name.rpartition(".")
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        copied.get_submodule(where).register_parameter(last, parameter)
    return copied


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
