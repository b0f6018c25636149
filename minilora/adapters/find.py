"""What is in a model: the places where adapters act, its own modules, and how many numbers they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from minilora.adapters.adapted import Adapted
from minilora.adapters.config import LoraConfig
from minilora.errors import TargetError
from minilora.models.bitsandbytes import describe
from minilora.quant.linear import Linear, NF4Linear, Scratch


def adapter_layers(model: nn.Module) -> dict[str, Adapted]:
    """Path -> what adapters put there, one place in another being its base; the inner ones come after the outer."""
    found: dict[str, Adapted] = {}
    for path, module in _walk(model):
        if isinstance(module, Adapted):
            while path in found:
                path = f"{path}.base"
            found[path] = module
    return found


def places_of(model: nn.Module, name: str) -> dict[str, Adapted]:
    """Path in the model -> the place where one adapter acts there; of others around it the path takes no notice."""
    return {layer.path: layer for layer in adapter_layers(model).values() if name in layer.configs}


def known_adapters(layers: Iterable[Adapted], names: Iterable[str] = ()) -> dict[str, LoraConfig]:
    """Name -> config of the adapters that act in these places.

    Raises:
        TargetError: one of these names is none of them.
    """
    known = {name: config for layer in layers for name, config in layer.configs.items()}
    if unknown := [name for name in names if name not in known]:
        raise TargetError(f"no adapter is called {unknown[0]!r}; the model has {sorted(known)}")
    return known


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, the model itself at "", as if no adapter had been attached."""
    return {path: module for path, module in _walk(model) if not isinstance(module, Adapted)}


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Path -> linear, adapted or not. Subclasses of `nn.Linear` are left out: they may compute something else."""
    modules: dict[str, Any] = base_modules(model)
    return {path: module for path, module in modules.items() if path and type(module) in (nn.Linear, NF4Linear)}


@contextmanager
def shared_scratch(model: nn.Module) -> Iterator[None]:
    """Within it, all linears in four bits of a model make their weights in one place; one thread may use the model."""
    linears, scratch = [module for module in model.modules() if isinstance(module, NF4Linear)], Scratch()
    try:
        for linear in linears:
            linear.scratch = scratch
        yield
    finally:
        for linear in linears:
            linear.scratch = None


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model once, with its path, the base of an adapted one after it and by the same path."""
    pending, seen = [("", model)], set()
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if isinstance(module, Adapted):
            pending.append((path, module.base))
        else:
            children = [(f"{path}.{name}" if path else name, child) for name, child in module._modules.items()]
            pending += [(where, child) for where, child in reversed(children) if child is not None]


def base_held(model: nn.Module) -> dict[str, Any]:
    """How the weights of the base are held, dense or quantized, in the words of the flags (`quant.files.describe`)."""
    return describe(linear_layers(model), head_path(model))


def head_path(model: nn.Module) -> str | None:
    """Where the output head is, by the method that transformers' models and ours have for it."""
    return _path_of(model, "get_output_embeddings")


def embedding_path(model: nn.Module) -> str | None:
    """Where the input embedding is, likewise."""
    return _path_of(model, "get_input_embeddings")


def _path_of(model: nn.Module, method: str) -> str | None:
    find = getattr(model, method, None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # as transformers says of models that have none
        found = None
    return next((path for path, module in _walk(model) if module is found), None) if found is not None else None


class ParameterCount(NamedTuple):
    """How many numbers are trained, of how many."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and all parameters, a shared one counted once; of a packed weight the numbers that it stands for."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    parts = {id(part) for linear in packed for part in linear.parts}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if id(p) not in parts]
    sizes += [(linear.out_features * linear.in_features, False) for linear in packed]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
