"""Adapters in and out of any `nn.Module`: the targeted linears are replaced by `LoRALinear`s that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.errors import TargetError, TrainingError
from minilora.lora.config import LoraConfig, select_targets
from minilora.lora.initialize import initial_factors
from minilora.lora.layers import AdapterLinear, LoRALinear
from minilora.quant.config import describe
from minilora.quant.linear import Linear, NF4Linear, dense_weight


class ParameterCount(NamedTuple):
    """How many numbers are trained, of how many."""

    trainable: int
    total: int


def attach(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Add a new adapter to the linears that `config` means, and make it the active and only trainable thing.

    The new adapter changes nothing until it is trained (B = 0). All other parameters are frozen.

    Args:
        model: any module; the linears are replaced in place.
        config: rank, scale and targets.
        name: the adapter's name; several can be attached under different names.
        seed: of the generator that draws A.
        dtype: of A and B.

    Raises:
        TargetError: nothing matches a part of `config` (see `select_targets`), or the name cannot be used.
    """
    linears = linear_layers(model)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in select_targets(list(linears), config, head_path(model)):
        sizes = config.rank(path), linears[path].in_features, linears[path].out_features
        lora_A, lora_B = initial_factors(config.init_lora_weights, *sizes, generator)
        factors[path] = lora_A.to(dtype), lora_B.to(dtype)
    place(model, config, name, factors, trainable=True)


def place(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    trainable: bool,
) -> None:
    """Put given factors, path -> (A, B), on the model's linears as the active adapter; freeze everything else.

    Raises:
        TargetError: the model has an adapter of that name, or the name cannot be used.
    """
    layers = adapter_layers(model)
    if not isinstance(name, str) or not name or "." in name or name in dir(nn.ParameterDict()):
        raise TargetError(f"adapter name {name!r}: need one that is not empty, has no dot and is no word of PyTorch's")
    if any(name in layer.configs for layer in layers.values()):
        raise TargetError(f"the model has an adapter {name!r} already; detach it first or give another name")
    linears = linear_layers(model)
    wrappers = {path: LoRALinear(linears[path], path) for path in factors if path not in layers}
    _replace(model, {wrapper.base: wrapper for wrapper in wrappers.values()})
    layers = {**layers, **wrappers}
    for path, (lora_A, lora_B) in factors.items():
        layers[path].add(name, config, lora_A, lora_B)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in factors:
        layers[path].lora_A[name].requires_grad_(trainable)
        layers[path].lora_B[name].requires_grad_(trainable)
    set_adapter(model, name)


def detach(model: nn.Module) -> None:
    """Take all adapters off: the base linears, bit for bit as they were, stand where they stood.

    Parameters that `attach` froze stay frozen.

    Raises:
        TargetError: there is no adapter.
    """
    _replace(model, {layer: layer.base for layer in _adapted(model).values()})


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights, W ← merged_weight(), and leave plain linears.

    A base in four bits becomes dense, also where it has no adapter: what comes out is one kind of model. A weight that
    was shared with another module is not shared any more: the other module keeps W.

    Raises:
        TargetError: there is no adapter, or none is active.
        TrainingError: an adapter holds a number that is not finite; the model is left as it was.
    """
    layers = _adapted(model)
    if not any(layer.active for layer in layers.values()):
        raise TargetError("no adapter is active, so there is nothing to merge")
    for path, layer in layers.items():
        for name in layer.active:
            if not all(bool(factor.isfinite().all()) for factor in (layer.lora_A[name], layer.lora_B[name])):
                raise TrainingError(f"{path}: adapter {name!r} holds numbers that are not finite; nothing was merged")
    for layer in layers.values():
        if layer.active and isinstance(layer.base, NF4Linear):
            layer.base = _dense(layer.merged_weight(), layer.base.bias)
        elif layer.active:
            layer.base.weight = nn.Parameter(layer.merged_weight().detach(), requires_grad=False)
    detach(model)
    packed = {base for base in linear_layers(model).values() if isinstance(base, NF4Linear)}
    _replace(model, {base: _dense(dense_weight(base), base.bias) for base in packed})


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters, and no others, act. Which parameters are trainable does not change.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    layers = _adapted(model)
    known = {name for layer in layers.values() for name in layer.configs}
    if unknown := [name for name in wanted if name not in known]:
        raise TargetError(f"no adapter is called {unknown[0]!r}; the model has {sorted(known)}")
    for layer in layers.values():
        layer.active = tuple(name for name in wanted if name in layer.configs)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as the block lasts."""
    layers = adapter_layers(model).values()
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = ()
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def set_dropout_step(model: nn.Module, seed: int, step: int) -> None:
    """Say which dropout masks the next forward pass draws; `train` does it before each one."""
    for layer in adapter_layers(model).values():
        layer.dropout_key = f"{seed}/{step}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and all parameters, a shared one counted once; of a packed weight the numbers that it stands for."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    parts = {id(part) for linear in packed for part in linear.parts}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if id(p) not in parts]
    sizes += [(linear.out_features * linear.in_features, False) for linear in packed]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Path -> adapted layer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLinear)}


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Path -> linear, adapted or not. Subclasses of `nn.Linear` are left out: they may compute something else."""
    found: dict[str, Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            found[path] = module.base
        elif type(module) in (nn.Linear, NF4Linear) and path and path.removesuffix(".base") not in found:
            found[path] = module
    return found


def _adapted(model: nn.Module) -> dict[str, AdapterLinear]:
    layers = adapter_layers(model)
    if not layers:
        raise TargetError("the model has no adapter")
    return layers


def _replace(model: nn.Module, substitutes: Mapping[nn.Module, nn.Module]) -> None:
    """Put each substitute wherever its original stands, also where one module stands in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a second name of one child
            if child is not None and child in substitutes and parent is not substitutes[child]:
                setattr(parent, name, substitutes[child])


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen plain linear of these numbers."""
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def base_held(model: nn.Module) -> dict[str, Any]:
    """How the weights of the base are held, dense or quantized, in the words of the flags (`quant.config.describe`)."""
    return describe(linear_layers(model), head_path(model))


def head_path(model: nn.Module) -> str | None:
    """Where the output head is, by the method that transformers' models and ours have for it."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None
