"""Attach the adapter that a `LoraConfig` describes to any `nn.Module`; delete it, or merge it for a while."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora import adapter
from minilora.adapter import activate, adapter_layers, base_modules, known_layers, replace_modules
from minilora.adapters.config import LoraConfig
from minilora.adapters.copies import TokenRows
from minilora.adapters.find import embedding_path, has_hooks, head_path
from minilora.adapters.from_data import FROM_DATA
from minilora.adapters.initialize import initial_factors
from minilora.adapters.parts import (
    LINEARS,
    AdapterSpec,
    build_adapter,
    build_specs,
    check_places,
    data_specs,
    is_read_by_kernels,
    kind_of,
    low_rank_spec,
    parameter_specs,
    targets,
)
from minilora.errors import TargetError, check_types
from minilora.lora import AdapterLinear, AdapterWrapper

# Models of transformers that scale what a tied head is given; later versions of T5 have a setting of its own for that.
SCALED_IF_TIED = ("longt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5")


def attach(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    losses: Iterable[Tensor] = (),
) -> None:
    """Add a new adapter to the modules that `config` means, and make it the active and only trainable thing.

    The new adapter changes nothing until it is trained, but for start values False and "loftq". All other parameters
    are frozen.

    Args:
        model: any module; the modules are replaced in place.
        config: rank, scale, targets and start values; without a `task_type`, a model of minilora says which it is.
        name: the adapter's name; several can be attached under different names.
        seed: of the generator that draws start values.
        dtype: of what is new.
        losses: for start values from data: losses of the model, each computed when it is asked for.

    Raises:
        TargetError: nothing matches a part of `config` (see `select_targets`), or the name cannot be used.
        ConfigError: a layer cannot have these start values.
    """
    check_types(attach, locals())
    config = replace(config, task_type=config.task_type or getattr(model, "task_type", None))
    modules, generator = base_modules(model), torch.Generator().manual_seed(seed)
    paths = targets(modules, config, head_path(model))
    if config.init_lora_weights in FROM_DATA and not any(p.is_meta for p in model.parameters()):
        config, factors = data_specs(model, modules, paths, config, losses, generator)
    else:
        factors = {path: low_rank_spec(modules[path], path, config, generator) for path in paths}
    draw = functools.partial(initial_factors, config.init_lora_weights, generator=generator)
    factors |= parameter_specs(modules, config, draw)
    specs = build_specs(modules, config, factors, embedding_path(model))
    inject_adapter(model, config, name, specs, dtype, trainable=True)


def inject_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    specs: Mapping[str, AdapterSpec],
    dtype: torch.dtype | None,
    trainable: bool,
) -> None:
    """Put an adapter, a spec for each path, on a model as the active one; freeze everything else.

    With a dtype it gets tensors of its own; else it holds those of the specs.

    Raises:
        TargetError: the model has an adapter of that name, the name cannot be used, or a spec cannot act.
    """
    layers, modules = adapter_layers(model), base_modules(model)
    _check_name(name, layers.values())
    check_places(modules, layers.values(), specs)
    known = {(layer.path, type(layer)): layer for layer in layers.values()}
    outermost = {**modules, **{layer.path: layer for layer in reversed(layers.values())}}
    substitutes = []
    for path, spec in specs.items():
        if (path, spec.kind) not in known:  # low-rank adapters are next to the base, other kinds of places around them
            inner = modules[path] if issubclass(spec.kind, AdapterLinear) else outermost[path]
            known[path, spec.kind] = spec.kind(spec.base or inner, path)
            substitutes.append((inner, known[path, spec.kind]))
    replace_modules(model, substitutes)
    for path, spec in sorted(specs.items(), key=lambda item: not item[1].tensors):  # what is shared comes last
        layer = known[path, spec.kind]
        if spec.tensors:
            tensors = {key: _own(tensor, dtype) for key, tensor in spec.tensors.items()}
            layer.add_adapter(name, build_adapter(layer, config, tensors), config)
        elif isinstance(layer, TokenRows):
            layer.share(name, [other for other in known.values() if isinstance(other, TokenRows)])
    activate(model, name, trainable)


def _check_name(name: str, layers: Iterable[AdapterWrapper]) -> None:
    if not name or "." in name or name in dir(nn.ModuleDict()):
        raise TargetError(f"adapter name {name!r}: need one that is not empty, has no dot and is no word of PyTorch's")
    if any(name in layer.configs for layer in layers):
        raise TargetError(f"the model has an adapter {name!r} already; detach it first or give another name")


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy in the dtype; the tensor itself if there is none."""
    if dtype is None:
        return tensor
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter off; where there is no other, the base module stands again.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    check_types(delete_adapter, locals())
    layers = [layer for layer in known_layers(model, name) if name in layer.configs]
    for layer in layers:
        del layer.adapters[name], layer.configs[name]
        layer.active = tuple(each for each in layer.active if each != name)
    replace_modules(model, ((layer, layer.base) for layer in reversed(layers) if not layer.configs))


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights, W ← merged_weight(), and leave plain modules.

    A weight that two modules share stays shared if both come out alike. Otherwise a model of transformers records in
    its config that they are not tied, or loading it again would tie them.

    Raises:
        TargetError: there is no adapter, none is active, or one's place has hooks; or weights would be shared no
            longer, in a model that computes otherwise then.
        TrainingError: an adapter holds a number that is not finite; the model is left as it was.
    """
    check_types(merge, locals())
    tied = _shared_weights(model)
    _check_ties(model, tied, _mergeable_layers(model))
    adapter.merge(model)
    for first, *others in tied:
        weight: Any = model.get_submodule(first).weight
        module: Any
        for module in map(model.get_submodule, others):
            if torch.equal(module.weight, weight):
                module.weight = weight
            elif callable(getattr(model, "save_pretrained", None)):
                model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _mergeable_layers(model: nn.Module) -> list[AdapterWrapper]:
    """Return the wrappers; raise a TargetError if one has hooks, which a plain module in its place would not have."""
    layers = known_layers(model)
    if hooked := [layer.path for layer in layers if has_hooks(layer)]:
        raise TargetError(f"{hooked[0]}: has hooks, which would be left out where it is merged; remove them")
    return layers


def _shared_weights(model: nn.Module) -> list[list[str]]:
    """Return the paths of the modules that share a weight, together."""
    sharing: dict[int, list[str]] = {}
    for path, module in base_modules(model).items():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(path)
    return [paths for paths in sharing.values() if len(paths) > 1]


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """The model with its active adapters folded into the weights, for as long as the block lasts.

    It computes as fast as without adapters, and holds the adapted weights twice. Then everything is as it was, to the
    bit: the bases were kept, and nothing is subtracted; what was attached within the block is gone with it.

    Raises:
        TargetError: there is no adapter, or one's place has hooks.
    """
    check_types(merged, locals())
    layers = list(reversed(_mergeable_layers(model)))  # those that do not act, too, or they could be switched on
    replaced = []
    try:
        for layer in layers:  # one after the other: what stands around another place sees what that one came to
            replaced += replace_modules(model, [(layer, layer.merged() if layer.active else layer.base)])
        yield
    finally:
        for parent, name, module in reversed(replaced):
            parent._modules[name] = module


def _check_ties(model: Any, tied: list[list[str]], layers: Iterable[AdapterWrapper]) -> None:
    """Refuse to untie a head whose model scales its input only where it is tied."""
    config: Any = getattr(model, "config", None)
    scales = getattr(config, "model_type", None) in SCALED_IF_TIED and not hasattr(config, "scale_decoder_outputs")
    changed = {layer.path for layer in layers if layer.active and not isinstance(layer, TokenRows)}
    if scales and (broken := sorted(changed & {path for paths in tied for path in paths})):
        raise TargetError(
            f"{broken[0]}: shares its weight, and a {config.model_type} model computes otherwise if it does not, so "
            "it cannot be merged; keep the adapter"
        )


def find_target_modules(model: nn.Module) -> list[str]:
    """Return the shortest `target_modules` that match all linears in a model's layers, and nothing else.

    A layer has a number in its path, as "3" in "model.layers.3.mlp.up_proj". Modules outside layers, such as heads and
    poolers, are left out, and of those in the layers

    - the routers of a mixture of experts: a small change there sends tokens to experts that have not learned them;
    - all of a Mamba mixer but its `in_proj`: fused kernels read the other weights without calling their modules, and an
      adapter there would do nothing.

    Raises:
        TargetError: there are no such linears.
    """
    check_types(find_target_modules, locals())
    modules = base_modules(model)
    chosen = {
        path
        for path, module in modules.items()
        if kind_of(module) in LINEARS and _is_in_layer(path) and not _is_router(path, modules)
        if not is_read_by_kernels(path, modules)
    }
    if not chosen:
        raise TargetError("the model has no linears in numbered layers; name what to adapt in target_modules")
    return _shortest_names(chosen, modules.keys() - chosen)


def _is_in_layer(path: str) -> bool:
    return any(part.isdecimal() for part in path.split(".")[:-1])


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a linear stands beside a module `experts` or belongs to a router."""
    parts = path.split(".")
    return "router" in parts or ".".join([*parts[:-1], "experts"]) in modules


def _shortest_names(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the shortest endings of the chosen paths with which no other path ends."""
    taken = {end for path in others for end in _ends(path)}
    return sorted({next((end for end in _ends(path) if end not in taken), path) for path in chosen})


def _ends(path: str) -> Iterator[str]:
    """Yield the endings of a path that start with a word, as "mlp.0" and "h.2.mlp.0" of "h.2.mlp.0"."""
    parts = path.split(".")
    return (".".join(parts[at:]) for at in reversed(range(len(parts))) if not parts[at].isdecimal())
