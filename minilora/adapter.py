"""Adapters in and out of a model: attach, switch, merge, detach, save, load.

An `AdapterWrapper` replaces each adapted module and holds it. `attach_lora`, `save_lora` and `load_lora` are for LoRA
and DoRA with one rank on all linear layers of some names; `minilora.adapters` has all that PEFT has. Saved adapters
have PEFT's layout, with tensors named `base_model.model.<path>.lora_A.weight`.
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

from minilora.errors import ConfigError, FormatError, TargetError, TrainingError, check_types
from minilora.lora import AdapterLinear, AdapterWrapper, LoraAdapter, dense_linear, dora_norm, lora_scale
from minilora.nf4 import NF4Linear

PREFIX = "base_model.model."


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once with its path; the base of a wrapper follows it and has the same path."""
    pending, seen = [("", model)], set()
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if isinstance(module, AdapterWrapper):
            pending.append((path, module.base))
        else:
            children = [(f"{path}.{name}".lstrip("."), child) for name, child in module._modules.items()]
            pending += [(where, child) for where, child in reversed(children) if child is not None]


def adapter_layers(model: nn.Module) -> dict[str, AdapterWrapper]:
    """Return the wrappers by path. One that is the base of another has the path of that one and ".base"."""
    found: dict[str, AdapterWrapper] = {}
    for path, module in walk(model):
        if isinstance(module, AdapterWrapper):
            while path in found:
                path = f"{path}.base"
            found[path] = module
    return found


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, the model itself at "", as if no adapter had been attached."""
    return {path: module for path, module in walk(model) if not isinstance(module, AdapterWrapper)}


def require_layers(model: nn.Module, *names: str) -> list[AdapterWrapper]:
    """Return the wrappers, the outer ones first. Raise a TargetError if there is none, or no adapter of a name."""
    layers = list(adapter_layers(model).values())
    if not layers:
        raise TargetError("the model has no adapter, or it is merged")
    known = {name for layer in layers for name in layer.configs}
    if unknown := [name for name in names if name not in known]:
        raise TargetError(f"no adapter is called {unknown[0]!r}; the model has {sorted(known)}")
    return layers


def layers_of(model: nn.Module, name: str) -> dict[str, AdapterWrapper]:
    """Return the wrappers that hold an adapter, by the path of their module; raise a TargetError if there are none."""
    return {layer.path: layer for layer in require_layers(model, name) if name in layer.configs}


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> list[tuple[Any, str, nn.Module]]:
    """Replace the first module of each pair by the second, wherever it stands; return (parent, name, first) each."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() leaves out a second name of one child
            places.setdefault(id(child), []).append((parent, name))
    replaced = []
    for module, substitute in pairs:
        for parent, name in places[id(module)]:
            parent._modules[name] = substitute
            replaced.append((parent, name, module))
    return replaced


def attach_lora(
    model: nn.Module,
    target_modules: Sequence[str],
    r: int = 16,
    lora_alpha: float = 32,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    name: str = "default",
    seed: int = 0,
) -> None:
    """Add a new adapter to the linear layers with these last names, activate it alone and freeze everything else.

    A ~ U(-1/√in, 1/√in) and B = 0, so it changes nothing until it is trained. Arguments are those of PEFT's LoraConfig.
    """
    if r < 1:
        raise ConfigError(f"r is {r}, need at least 1")
    generator, scale, wrappers = torch.Generator().manual_seed(seed), lora_scale(r, lora_alpha), adapter_layers(model)
    linears = {p: m for p, m in base_modules(model).items() if type(m) in (nn.Linear, NF4Linear)}
    found = {path.rpartition(".")[2] for path in linears}
    if not target_modules or isinstance(target_modules, str) or set(target_modules) - found:
        raise TargetError(f"target_modules is {target_modules!r}, need a list of some of {sorted(found)}")
    chosen = {path: linear for path, linear in linears.items() if path.rpartition(".")[2] in target_modules}
    if taken := [path for path in chosen if path in wrappers and name in wrappers[path].configs]:
        raise TargetError(f"{taken[0]} has an adapter {name!r} already")
    layers: dict[str, Any] = {path: wrappers.get(path) or AdapterLinear(chosen[path], path) for path in chosen}
    for layer in layers.values():
        shape_A, shape_B = layer.shapes(layer.base, r)
        A, B = torch.empty(shape_A, dtype=torch.float32), torch.zeros(shape_B, dtype=torch.float32)
        tensors = {"lora_A": nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator), "lora_B": B}
        if use_dora:  # m = ‖W‖
            tensors["magnitude"] = dora_norm(layer.base.weight.cpu(), **tensors, scale=scale)
        layer.add_adapter(name, LoraAdapter(tensors, scale, lora_dropout))
    replace_modules(model, [(linear, layers[path]) for path, linear in chosen.items() if path not in wrappers])
    activate(model, name, trainable=True)


def activate(model: nn.Module, name: str, trainable: bool) -> None:
    """Activate one adapter alone and freeze everything else, and the adapter, too, unless it is `trainable`."""
    model.requires_grad_(False)
    for layer in adapter_layers(model).values():
        for parameter in layer.own_parameters(name) if name in layer.configs else ():
            parameter.requires_grad_(trainable)
    set_adapter(model, name)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Activate these adapters and no others. Which parameters are trainable does not change."""
    check_types(set_adapter, locals())
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    layers = require_layers(model, *wanted)
    for layer in layers if len(wanted) > 1 else ():
        if len(conflicting := layer.conflicting_adapters(wanted)) > 1:
            raise TargetError(f"{layer.path}: {conflicting} train the same parameter, and only one can be active")
    for layer in layers:
        layer.active = tuple(name for name in wanted if name in layer.configs)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute as the base model does inside the block; raise a TargetError if the model has no adapter."""
    check_types(disable_adapter, locals())
    before = [(layer, layer.active) for layer in require_layers(model)]
    try:
        for layer, _ in before:
            layer.active = ()
        yield
    finally:
        for layer, active in before:
            layer.active = tuple(name for name in active if name in layer.configs)


def detach(model: nn.Module) -> None:
    """Remove all adapters and put the base modules back, bit for bit as they were."""
    check_types(detach, locals())
    replace_modules(model, ((layer, layer.base) for layer in reversed(require_layers(model))))  # the inner ones first


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights, W ← merged_weight(), and leave plain modules, all of them dense."""
    layers = require_layers(model)
    if not any(layer.active for layer in layers):
        raise TargetError("no adapter is active, so there is nothing to merge")
    for layer in layers:
        if layer.active and not all(bool(p.isfinite().all()) for p in layer.merged().parameters()):
            raise TrainingError(f"{layer.path}: merged, it has numbers that are not finite; nothing was merged")
    while layers:  # the inner ones first; each is freed before the next is merged
        layer = layers.pop()
        replace_modules(model, [(layer, layer.merged() if layer.active else layer.base)])
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    replace_modules(model, ((linear, dense_linear(linear.weight, linear.bias)) for linear in packed))


def lora_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by their names in PEFT's file."""
    layers = layers_of(model, name)
    return {f"{PREFIX}{path}.{key}": t for path in layers for key, t in layers[path].peft_tensors(name).items()}


def save_lora(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write an adapter of all linear layers of some names, with one rank and one scale, in PEFT's layout."""
    layers = {where: layer.adapters[name] for where, layer in layers_of(model, name).items()}
    targets = {where.rpartition(".")[2] for where in layers}
    is_lora = all(type(each) is LoraAdapter and each.bias is each.lora_bias is None for each in layers.values())
    is_even = is_lora and len({(len(each.lora_A), each.scale) for each in layers.values()}) == 1
    if not is_even or {where for where in base_modules(model) if where.rpartition(".")[2] in targets} != layers.keys():
        raise TargetError(f"{name}: need one rank and scale on all modules of some names; see `ml.save_adapter`")
    adapter = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": len(adapter.lora_A),
        "lora_alpha": adapter.scale * len(adapter.lora_A),
        "lora_dropout": adapter.dropout.p,
        "use_dora": adapter.magnitude is not None,
        "target_modules": sorted(targets),
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in lora_tensors(model, name).items()}
    save_file(tensors, Path(path) / "adapter_model.safetensors")
    (Path(path) / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_lora(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Read an adapter that `save_lora` wrote, attach it and activate it alone; a FormatError leaves it attached."""
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    stored = load_file(Path(path) / "adapter_model.safetensors")
    if more := [key for key in ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias") if config.get(key)]:
        raise FormatError(f"{path}: adapter_config.json sets {more}; `minilora.adapters` reads such adapters")
    numbers = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_dora")}
    attach_lora(model, config["target_modules"], **numbers, name=name)
    tensors = lora_tensors(model, name)
    there, wanted = ({(key, tuple(t.shape)) for key, t in each.items()} for each in (stored, tensors))
    if there != wanted:
        raise FormatError(f"{path}: missing, unexpected or misshapen tensors: {sorted(there ^ wanted)[:5]}")
    with torch.no_grad():
        for key, parameter in tensors.items():
            parameter.copy_(stored[key])
    activate(model, name, trainable)
