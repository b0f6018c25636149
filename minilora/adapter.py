"""Adapters in and out of a model: attach, switch, merge, detach, save, load.

A wrapper, such as `LoraLinear`, replaces each adapted module and holds it. `attach_lora`,
`save_lora` and `load_lora` are for LoRA and DoRA with one rank on the linear layers of some names;
what else PEFT has is in `minilora.adapters`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.errors import ConfigError, FormatError, TargetError
from minilora.lora import (
    AdapterWrapper,
    LoraAdapter,
    LoraLinear,
    dense_linear,
    dora_norm,
    initial_factors,
    lora_scale,
)
from minilora.nf4 import NF4Linear

PREFIX = "base_model.model."  # of a tensor's name in PEFT's file, before the path of its module
PEFT_NAMES = {  # of a layer's tensors, after the path
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


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
    """Return the wrappers.

    Raises:
        TargetError: there are none, or no adapter has one of these names.
    """
    layers = list(adapter_layers(model).values())
    if not layers:
        raise TargetError("the model has no adapter, or it is merged")
    known = {name for layer in layers for name in layer.adapters}
    if unknown := [name for name in names if name not in known]:
        raise TargetError(f"no adapter is called {unknown[0]!r}; the model has {sorted(known)}")
    return layers


def layers_of(model: nn.Module, name: str) -> dict[str, AdapterWrapper]:
    """Return the wrappers that hold an adapter, at least one, by path."""
    return {layer.path: layer for layer in require_layers(model, name) if name in layer.adapters}


def add_adapter(layer: AdapterWrapper, name: str, adapter: nn.Module) -> None:
    """Add an adapter on the base's device. It is inactive until `active` names it."""
    example = next(layer.base.parameters())
    layer.adapters[name] = adapter if example.is_meta else adapter.to(example.device)
    adapter.train(layer.training)


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
        ConfigError: r is below 1.
        TargetError: no linear has such a name, one has hooks, or the adapter's name is taken.
    """
    if r < 1:
        raise ConfigError(f"r is {r}, need at least 1")
    layers = adapter_layers(model)
    if any(name in layer.adapters for layer in layers.values()):
        raise TargetError(f"the model has an adapter {name!r} already")
    modules: dict[str, Any] = base_modules(model)
    linears = {path: m for path, m in modules.items() if type(m) in (nn.Linear, NF4Linear)}
    names = {path.rpartition(".")[2] for path in linears}
    if not target_modules or isinstance(target_modules, str) or set(target_modules) - names:
        raise TargetError(f"target_modules is {target_modules!r}, need a list from {sorted(names)}")
    chosen = {p: m for p, m in linears.items() if p.rpartition(".")[2] in target_modules}
    if hooked := [p for p, m in chosen.items() if m._forward_hooks or m._forward_pre_hooks]:
        raise TargetError(f"{hooked[0]}: has hooks, which an adapter would skip")
    new = {path: LoraLinear(base, path) for path, base in chosen.items() if path not in layers}
    layers |= new
    generator = torch.Generator().manual_seed(seed)
    scale = lora_scale(r, lora_alpha, use_rslora)
    for path, base in chosen.items():
        tensors = initial_factors(r, base.in_features, base.out_features, generator)
        if use_dora:  # m = ‖W‖
            tensors["magnitude"] = dora_norm(base.weight.cpu(), **tensors, scale=scale)
        add_adapter(layers[path], name, LoraAdapter(tensors, scale, lora_dropout))
    replace_modules(model, [(layer.base, layer) for layer in new.values()])
    activate(model, name, trainable=True)


def activate(model: nn.Module, name: str, trainable: bool) -> None:
    """Activate only this adapter and freeze all else; the adapter trains if `trainable`."""
    model.requires_grad_(False)
    set_adapter(model, name, trainable=trainable)


def set_adapter(model: nn.Module, *names: str, trainable: bool | None = None) -> None:
    """Activate only these adapters. They are trainable if any adapter was; others are frozen."""
    layers = require_layers(model, *names)
    own = [(key, p) for each in layers for key in each.adapters for p in own_parameters(each, key)]
    if trainable is None:
        trainable = any(p.requires_grad for _, p in own)
    for key, parameter in own if names else ():  # without names, all stay as they are
        parameter.requires_grad_(trainable and key in names)
    for layer in layers:
        layer.active = tuple(name for name in names if name in layer.adapters)


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
    """Fold the active adapters into the weights, and leave plain modules, all of them dense."""
    layers = require_layers(model)
    if not any(layer.active for layer in layers):
        raise TargetError("no adapter is active, so there is nothing to merge")
    while layers:  # each is freed before the next is merged
        layer = layers.pop()
        replace_modules(model, [(layer, layer.merged() if layer.active else layer.base)])
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    replace_modules(model, ((each, dense_linear(each.weight, each.bias)) for each in packed))


def lora_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter of linear layers by their names in PEFT's file."""
    return {
        f"{PREFIX}{path}.{PEFT_NAMES[key]}": tensor
        for path, layer in layers_of(model, name).items()
        for key in PEFT_NAMES
        if (tensor := getattr(layer.adapters[name], key)) is not None
    }


def save_lora(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write an adapter of linear layers, of one rank and scale, without biases, in PEFT's layout.

    Raises:
        TargetError: the adapter has more, which `ml.save_adapter` writes.
    """
    layers = layers_of(model, name)
    adapters = [each.adapters[name] for each in layers.values() if type(each) is LoraLinear]
    plain = [a for a in adapters if type(a) is LoraAdapter and a.bias is a.lora_bias is None]
    if len(plain) < len(layers) or len({(len(a.lora_A), a.scale) for a in plain}) > 1:
        raise TargetError(f"{name}: need linear layers of one rank and scale; see ml.save_adapter")
    adapter = adapters[0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": len(adapter.lora_A),
        "lora_alpha": adapter.scale * len(adapter.lora_A),  # so that α/r is the scale
        "lora_dropout": adapter.dropout.p,
        "use_rslora": False,
        "use_dora": adapter.magnitude is not None,
        "target_modules": sorted({where.rpartition(".")[2] for where in layers}),
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in lora_tensors(model, name).items()}
    save_file(tensors, Path(path) / "adapter_model.safetensors")
    (Path(path) / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_lora(
    model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False
) -> None:
    """Read an adapter that `save_lora` wrote, attach it and activate it alone.

    Raises:
        FormatError: the files hold something else; the adapter may be attached.
    """
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    stored = load_file(Path(path) / "adapter_model.safetensors")
    if config.get("alpha_pattern"):
        raise FormatError(f"{path}: alpha_pattern is for `ml.load_adapter`")
    keys = ("target_modules", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout")
    if missing := [key for key in keys if key not in config]:
        raise FormatError(f"{path}: it lacks {missing}")
    attach_lora(model, **{key: config[key] for key in keys}, name=name)
    tensors = lora_tensors(model, name)
    found, wanted = ({(key, t.shape) for key, t in each.items()} for each in (stored, tensors))
    if wrong := sorted(found ^ wanted)[:5]:
        raise FormatError(f"{path}: missing, unexpected or misshapen tensors: {wrong}")
    with torch.no_grad():
        for key, parameter in tensors.items():
            parameter.copy_(stored[key])
    activate(model, name, trainable)
