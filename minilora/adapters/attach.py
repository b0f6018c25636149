"""Adapters in and out of any `nn.Module`: where one acts, an `Adapted` stands that holds the module it replaced."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapted import Adapted, has_hooks
from minilora.adapters.config import LoraConfig
from minilora.adapters.find import (
    adapter_layers,
    base_modules,
    embedding_path,
    head_path,
    known_adapters,
    linear_layers,
)
from minilora.adapters.from_data import FROM_DATA
from minilora.adapters.initialize import initial_factors
from minilora.adapters.layers import AdapterLayer
from minilora.adapters.parts import Part, check_places, completed, data_parts, low_rank_part, parameter_parts, targets
from minilora.adapters.tokens import TokenRows
from minilora.errors import TargetError, TrainingError
from minilora.quant.linear import NF4Linear, dense_linear, dense_weight


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
    config = replace(config, task_type=config.task_type or getattr(model, "task_type", None))
    modules, generator = base_modules(model), torch.Generator().manual_seed(seed)
    paths = targets(modules, config, head_path(model))
    if config.init_lora_weights in FROM_DATA and not any(p.is_meta for p in model.parameters()):
        config, factors = data_parts(model, modules, paths, config, losses, generator)
    else:
        factors = {path: low_rank_part(modules[path], path, config, generator) for path in paths}
    draw = functools.partial(initial_factors, config.init_lora_weights, generator=generator)
    factors |= parameter_parts(modules, config, draw)
    place(model, config, name, completed(modules, config, factors, embedding_path(model)), dtype, trainable=True)


def place(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    parts: Mapping[str, Part],
    dtype: torch.dtype | None,
    trainable: bool,
) -> None:
    """Put an adapter, path -> what it has there, on a model as the active one; freeze everything else.

    With a dtype it gets tensors of its own; else it holds those of the parts.

    Raises:
        TargetError: the model has an adapter of that name, the name cannot be used, or a part is none of a module.
    """
    layers, modules = adapter_layers(model), base_modules(model)
    _check_name(name, layers.values())
    check_places(modules, layers.values(), parts)
    known = {(layer.path, type(layer)): layer for layer in layers.values()}
    outermost = {**modules, **{layer.path: layer for layer in reversed(layers.values())}}
    substitutes = []
    for path, part in parts.items():
        if (path, part.kind) not in known:  # low-rank adapters are next to the base, other kinds of places around them
            inner = modules[path] if issubclass(part.kind, AdapterLayer) else outermost[path]
            known[path, part.kind] = part.kind(part.base or inner, path)
            substitutes.append((inner, known[path, part.kind]))
    _replace(model, substitutes)
    for path, part in sorted(parts.items(), key=lambda item: not item[1].tensors):  # what is shared comes last
        layer = known[path, part.kind]
        if part.tensors:
            layer.add(name, config, {key: _own(tensor, dtype) for key, tensor in part.tensors.items()})
        elif isinstance(layer, TokenRows):
            layer.share(name, [other for other in known.values() if isinstance(other, TokenRows)])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, part in parts.items():
        for parameter in known[path, part.kind].trained(name):
            parameter.requires_grad_(trainable)
    set_adapter(model, name)


def _check_name(name: object, layers: Iterable[Adapted]) -> None:
    if not isinstance(name, str) or not name or "." in name or name in dir(nn.ModuleDict()):
        raise TargetError(f"adapter name {name!r}: need one that is not empty, has no dot and is no word of PyTorch's")
    if any(name in layer.configs for layer in layers):
        raise TargetError(f"the model has an adapter {name!r} already; detach it first or give another name")


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy in the dtype; the tensor itself if there is none."""
    if dtype is None:
        return tensor
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def detach(model: nn.Module) -> None:
    """Take all adapters off: the base modules, bit for bit as they were, stand where they stood.

    Parameters that `attach` froze stay frozen.

    Raises:
        TargetError: there is no adapter.
    """
    _replace(model, ((layer, layer.base) for layer in reversed(_adapted(model).values())))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter off; where there is no other, the base module stands again.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    layers = [layer for layer in _adapted(model, name).values() if name in layer.configs]
    for layer in layers:
        layer.drop(name)
    _replace(model, ((layer, layer.base) for layer in reversed(layers) if not layer.configs))


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights, W ← merged_weight(), and leave plain modules.

    A base in four bits becomes dense, also where it has no adapter: what comes out is one kind of model. A weight that
    was shared with another module is shared on only if both come out alike; else the other module keeps its own.

    Raises:
        TargetError: there is no adapter, none is active, or one's place has hooks; or weights would be shared no
            longer, in a model that computes otherwise then.
        TrainingError: an adapter holds a number that is not finite; the model is left as it was.
    """
    layers = _mergeable(model)
    if not any(layer.active for layer in layers.values()):
        raise TargetError("no adapter is active, so there is nothing to merge")
    for path, layer in layers.items():
        for name in layer.active:
            if not all(bool(parameter.isfinite().all()) for parameter in layer.trained(name)):
                raise TrainingError(f"{path}: adapter {name!r} holds numbers that are not finite; nothing was merged")
    tied = _tied(model)
    _check_ties(model, tied, layers.values())
    pending = list(layers.values())
    del layers, layer
    _replace(model, _merged(pending))
    packed = {base for base in linear_layers(model).values() if isinstance(base, NF4Linear)}
    _replace(model, ((base, dense_linear(dense_weight(base), base.bias)) for base in packed))
    _tie(model, tied)


def _merged(layers: list[Adapted]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each with what it comes to, the inner ones first; those that are done are let go, or all would be held twice."""
    while layers:
        layer = layers.pop()
        yield layer, layer.merged() if layer.active else layer.base


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """The model with its active adapters folded into the weights, for as long as the block lasts.

    It computes as fast as without adapters, and holds the adapted weights twice. Then everything is as it was, to the
    bit: the bases were kept, and nothing is subtracted; what was attached within the block is gone with it.

    Raises:
        TargetError: there is no adapter, or one's place has hooks.
    """
    layers = list(reversed(_mergeable(model).values()))  # those that do not act, too, or they could be switched on
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        # one after the other: what stands around another place sees what that one came to
        _replace(model, ((layer, layer.merged() if layer.active else layer.base) for layer in layers), swapped)
        yield
    finally:
        for holder, name, layer in reversed(swapped):
            holder._modules[name] = layer


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters, and no others, act. Which parameters are trainable does not change.

    Raises:
        TargetError: the model has no adapter of that name, or two of them have trained the same parameter.
    """
    if not isinstance(names, str) and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
        raise TargetError(f"set_adapter: found {names!r}, need a name or a list of names")
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    layers = _adapted(model, *wanted)
    for path, layer in layers.items() if len(wanted) > 1 else ():
        if len(rivals := layer.rivals(wanted)) > 1:
            raise TargetError(f"{path}: {rivals} have trained the same parameter, and only one of them can act")
    for layer in layers.values():
        layer.active = tuple(name for name in wanted if name in layer.configs)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as the block lasts."""
    layers = adapter_layers(model).values()
    before, mixes = [layer.active for layer in layers], [layer.mixed for layer in layers]
    try:
        for layer in layers:
            layer.active, layer.mixed = (), None
        yield
    finally:
        for layer, active, mixed in zip(layers, before, mixes, strict=True):
            layer.active, layer.mixed = tuple(name for name in active if name in layer.configs), mixed


def set_dropout_step(model: nn.Module, seed: int, step: int) -> None:
    """Say which dropout masks the next forward pass draws; `train` does it before each one."""
    for layer in adapter_layers(model).values():
        layer.seed_dropout(f"{seed}/{step}")


def forget_dropout_step(model: nn.Module) -> None:
    """Leave no step behind, whose masks every later forward pass would draw."""
    for layer in adapter_layers(model).values():
        layer.dropout_seeds = {}


def _adapted(model: nn.Module, *names: str) -> dict[str, Adapted]:
    """The places of adapters; there must be one, and one for each of the names."""
    layers = adapter_layers(model)
    if not layers:
        raise TargetError("the model has no adapter")
    known_adapters(layers.values(), names)
    return layers


def _mergeable(model: nn.Module) -> dict[str, Adapted]:
    """The places of adapters, none of which has hooks that a plain module in its place would not have."""
    layers = _adapted(model)
    if hooked := [path for path, layer in layers.items() if has_hooks(layer)]:
        raise TargetError(f"{hooked[0]}: has hooks, which would be left out where it is merged; remove them")
    return layers


def _replace(
    model: nn.Module,
    substitutes: Iterable[tuple[nn.Module, nn.Module]],
    swapped: list[tuple[nn.Module, str, nn.Module]] | None = None,
) -> None:
    """Put each substitute wherever its original stands, also where one module stands in several places.

    `swapped` gets the way back: in which module, under which name, what stood there.
    """
    places: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}  # weak, or what is replaced would live on
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() leaves out a second name of one child
            places.setdefault(id(child), []).append((weakref.ref(parent), name))
    for original, substitute in substitutes:
        for reference, name in places[id(original)]:
            if (holder := reference()) is not None:
                holder._modules[name] = substitute
                if swapped is not None:
                    swapped.append((holder, name, original))


def _tied(model: nn.Module) -> list[list[str]]:
    """Paths of the modules that share a weight."""
    sharing: dict[int, list[str]] = {}
    for path, module in base_modules(model).items():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(path)
    return [paths for paths in sharing.values() if len(paths) > 1]


def _check_ties(model: Any, tied: list[list[str]], layers: Iterable[Adapted]) -> None:
    """Refuse what would break a tie that the model's own forward asks for (some scale what a tied head is given)."""
    asks = "tie_word_embeddings" in inspect.unwrap(type(model).forward).__code__.co_names
    changed = {layer.path for layer in layers if layer.active and not isinstance(layer, TokenRows)}
    if asks and (broken := sorted(changed & {path for paths in tied for path in paths})):
        raise TargetError(
            f"{broken[0]}: shares its weight, and {type(model).__name__} computes otherwise if it does not, so it "
            "cannot be merged; keep the adapter"
        )


def _tie(model: Any, tied: list[list[str]]) -> None:
    """Let modules share their weight again if it is the same; else a model of transformers has to know, or to load it
    again would tie them.
    """
    for first, *others in tied:
        weight = model.get_submodule(first).weight
        for module in map(model.get_submodule, others):
            if torch.equal(module.weight, weight):
                module.weight = weight
            elif callable(getattr(model, "save_pretrained", None)):
                model.config.tie_word_embeddings = False
