"""Adapters in and out of a model: attach, switch, merge, detach, and the tensors of their files.

A wrapper, such as `LoraLinear`, replaces each adapted module and contains it as `base`.
`attach_lora` is for LoRA and DoRA with one rank on linear layers. The command uses `ml.attach` and
`ml.save_adapter`, which take any `LoraConfig` and end in `inject_adapter` and `adapter_tensors`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import FormatError, TargetError, TrainingError
from minilora.lora import (
    AdapterWrapper,
    Linear,
    LoraAdapter,
    LoraLinear,
    dense_linear,
    dora_norm,
    initial_factors,
    lora_scale,
)
from minilora.nf4 import NF4Linear

PREFIX = "base_model.model."  # of a tensor's name in PEFT's file, before the path of its module


def walk(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once with its path. The base of a wrapper follows, with the same path."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield path, module
    if isinstance(module, AdapterWrapper):
        yield from walk(module.base, path, seen)
        return
    for name, child in module.named_children():
        yield from walk(child, f"{path}.{name}".lstrip("."), seen)


def adapter_layers(model: nn.Module) -> dict[str, AdapterWrapper]:
    """Return the wrappers by path."""
    return {path: module for path, module in walk(model) if isinstance(module, AdapterWrapper)}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, the model itself at "", as if no adapter were attached."""
    return {path: module for path, module in walk(model) if not isinstance(module, AdapterWrapper)}


def require_layers(model: nn.Module, *names: str) -> list[AdapterWrapper]:
    """Return the wrappers; if there are none, or no adapter of a name, raise a TargetError."""
    layers = list(adapter_layers(model).values())
    if not layers:
        raise TargetError("the model has no adapter, or it is merged; attach or load one")
    known = {name for layer in layers for name in layer.adapters}
    if unknown := [name for name in names if name not in known]:
        raise TargetError(f"no adapter is called {unknown[0]!r}; the model has {sorted(known)}")
    return layers


def layers_of(model: nn.Module, name: str) -> dict[str, AdapterWrapper]:
    """Return the wrappers that hold an adapter, at least one, by path."""
    return {layer.path: layer for layer in require_layers(model, name) if name in layer.adapters}


def own_parameters(layer: AdapterWrapper, name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter that are not the base's as well."""
    shared = {id(parameter) for parameter in layer.base.parameters()}
    return [p for p in layer.adapters[name].parameters() if id(p) not in shared]


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace the first module of each pair with the second, everywhere it is used."""
    places: dict[nn.Module | None, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() leaves out a second name
            places.setdefault(child, []).append((parent, name))
    for module, substitute in pairs:
        for parent, name in places[module]:
            parent._modules[name] = substitute


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the linears by path, adapted or not, without subclasses of `nn.Linear`."""
    modules: dict[str, Any] = base_modules(model)
    return {path: m for path, m in modules.items() if path and type(m) in (nn.Linear, NF4Linear)}


def attach_lora(
    model: nn.Module,
    target_modules: Sequence[str],
    r: int = 16,
    lora_alpha: float = 32,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    name: str = "default",
    seed: int = 0,
) -> None:
    """Add an adapter to the linear layers of these names, such as `q_proj`; activate only it.

    Everything else is frozen. The arguments are those of PEFT's LoraConfig.

    Raises:
        TargetError: no linear layer has such a name; or as in `inject_adapter`.
    """
    layers = {}
    generator = torch.Generator().manual_seed(seed)
    scale = lora_scale(r, lora_alpha, use_rslora)
    for path, base in linear_layers(model).items():
        if path.rpartition(".")[2] in target_modules:
            tensors = initial_factors(r, base.in_features, base.out_features, generator)
            if use_dora:  # m = ‖W‖
                tensors["magnitude"] = dora_norm(base.weight.cpu(), **tensors, scale=scale)
            layers[path] = LoraLinear(base, path, {name: LoraAdapter(tensors, scale, lora_dropout)})
    if missing := set(target_modules) - {path.rpartition(".")[2] for path in layers}:
        raise TargetError(f"no linear layer is called {sorted(missing)}")
    inject_adapter(model, layers, name)


def inject_adapter(model: nn.Module, layers: Mapping[str, AdapterWrapper], name: str) -> None:
    """Put wrappers around modules, each with an adapter of this name, and activate only it.

    A module that is wrapped already gets the adapter into its wrapper. Everything else is frozen.

    Raises:
        TargetError: there are no layers, or the name is taken; a linear layer has hooks, or a
            module has a wrapper of another kind.
    """
    held = adapter_layers(model)
    if not layers or any(name in layer.adapters for layer in held.values()):
        problem = "the model has it already" if layers else "it adapts nothing"
        raise TargetError(f"adapter {name!r}: {problem}")
    for path, layer in layers.items():
        if path in held and type(layer) is not type(held[path]):
            others = sorted(held[path].adapters)
            raise TargetError(
                f"{path}: adapters {others} wrap it by another class; delete them first"
            )
        hooks = layer.base._forward_hooks or layer.base._forward_pre_hooks
        if hooks and isinstance(layer, LoraLinear):
            raise TargetError(f"{path}: has hooks, which an adapter would skip")
    for path in layers.keys() & held.keys():
        held[path].add(name, layers[path].adapters[name])
    replace_modules(model, [(new.base, new) for path, new in layers.items() if path not in held])
    activate(model, name, trainable=True)


def activate(model: nn.Module, name: str, trainable: bool) -> None:
    """Activate only this adapter and freeze all else; the adapter trains if `trainable`."""
    model.requires_grad_(False)
    set_adapter(model, name, trainable)


def set_adapter(
    model: nn.Module, names: str | Sequence[str], trainable: bool | None = None
) -> None:
    """Activate these adapters, in the order in which they act, and no others.

    They train if `trainable` says so or, by default, if any adapter of the model did; all others
    are frozen. Without a name the base acts, and nothing is frozen.

    Raises:
        TargetError: there is no such adapter, or two of them train the same parameter.
    """
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    layers = require_layers(model, *names)
    own = [(k, p) for layer in layers for k in layer.adapters for p in own_parameters(layer, k)]
    active = [tuple(name for name in names if name in layer.adapters) for layer in layers]
    for layer, chosen in zip(layers, active, strict=True):
        replaced = [part for name in chosen for part in layer.adapters[name].replaced()]
        if len(set(replaced)) < len(replaced):
            raise TargetError(f"{layer.path}: {chosen} train the same parameter; activate one")
    if trainable is None:
        trainable = any(p.requires_grad for _, p in own)
    for key, parameter in own if names else ():  # without names, all stay as they are
        parameter.requires_grad_(trainable and key in names)
    for layer, chosen in zip(layers, active, strict=True):
        layer.active = chosen


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute as the base does inside the block. What is activated inside stays active."""
    before = [(layer, layer.active) for layer in require_layers(model)]
    try:
        for layer, _ in before:
            layer.active = ()
        yield
    finally:
        if not any(layer.active for layer in adapter_layers(model).values()):
            for layer, active in before:
                layer.active = tuple(name for name in active if name in layer.adapters)


def detach(model: nn.Module) -> None:
    """Remove all adapters and put the base modules back, bit for bit."""
    replace_modules(model, [(layer, layer.base) for layer in require_layers(model)])


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights, and leave plain modules, all of them dense.

    Raises:
        TargetError: there is no adapter, or none is active.
        TrainingError: a merged weight is not finite; the model is left as it was.
    """
    layers = require_layers(model)
    if not any(layer.active for layer in layers):
        raise TargetError("nothing to merge: no adapter is active; choose one by set_adapter")
    replace_modules(model, [(layer, merged_module(layer)) for layer in layers])
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    replace_modules(model, ((layer, dense_linear(layer.weight, layer.bias)) for layer in packed))


@torch.no_grad()
def merged_module(layer: AdapterWrapper) -> nn.Module:
    """Return the plain module that computes what a wrapper does, which has finite numbers."""
    if not layer.active:
        return layer.base
    module = layer.merged()
    if not all(parameter.isfinite().all() for parameter in module.parameters()):
        raise TrainingError(f"{layer.path}: merged, it has numbers that are not finite")
    return module


def adapter_tensors(layers: Mapping[str, AdapterWrapper], name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in PEFT's file."""
    return {
        f"{PREFIX}{path}.{layer.PEFT_NAMES.get(key, key)}": tensor
        for path, layer in layers.items()
        for key, tensor in layer.adapters[name].tensors().items()
    }


@torch.no_grad()
def copy_tensors_(own: Mapping[Any, Tensor], stored: Mapping[Any, Tensor]) -> None:
    """Copy the tensors of a file into those of an adapter, which have the same names and shapes."""
    given, wanted = ({(key, t.shape) for key, t in tensors.items()} for tensors in (stored, own))
    if wrong := sorted(given ^ wanted)[:5]:
        raise FormatError(f"missing, unexpected or misshapen tensors: {wrong}")
    for key, tensor in own.items():
        tensor.copy_(stored[key])
