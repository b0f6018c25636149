"""Weighted sums of adapters: a new adapter of a model from those it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from minilora.adapter import layers_of
from minilora.adapters.attach import config_of_adapter, inject_adapter
from minilora.adapters.build import AdapterSpec
from minilora.adapters.combine import CombineConfig, Factors, LowRank, combine
from minilora.adapters.config import LoraConfig, Task
from minilora.adapters.modules_to_save import ModulesToSave, TrainableTokens
from minilora.errors import ConfigError, check_types
from minilora.lora import AdapterWrapper, LoraAdapter


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, config: CombineConfig | None = None
) -> dict[str, LowRank]:
    """Combine several adapters, each with a weight, into a new one, and activate it; the others stay as they are.

    The new adapter is frozen. Modules and token rows that one of them has trained are carried over as they are, without
    the weight. Return the new factors and what an SVD has cut off, by path.

    Raises:
        ConfigError: an adapter has more than updates s·B A, which alone can be added, or two have trained one module in
            full or rows of it.
        ShapeError: adapters of one module differ in rank, and "linear" cannot add them.
        TargetError: there is no such adapter, or one of the new name already.
    """
    check_types(combine_adapters, locals())
    held = {each: layers_of(model, each) for each in weights}
    task = config_of_adapter(model, next(iter(weights))).task_type if weights else None
    saved: dict[str, AdapterSpec] = {}
    for each, layers in held.items():
        own = _trained_in_full(layers, each)
        if twice := sorted(own.keys() & saved):
            raise ConfigError(f"{twice[0]}: several of {list(weights)} have trained it in full, and only one can act")
        saved |= own
        held[each] = {path: layer for path, layer in layers.items() if path not in own}
    adapters = [{path: layer.adapters[each] for path, layer in layers.items()} for each, layers in held.items()]
    for each, parts in zip(held, adapters, strict=True):
        if others := [path for path, adapter in parts.items() if not _is_update(adapter)]:
            raise ConfigError(
                f"{each}: cannot be combined with other adapters, or weighed: it has more than updates s·B A, which "
                "alone can be added, such as DoRA's m, trained biases, or a part of weights that are not "
                f"loaded: {others[:5]}"
            )
    factors = [{path: Factors(a.lora_A, a.lora_B, a.scale) for path, a in parts.items()} for parts in adapters]
    cuts = combine(factors, list(weights.values()), config)
    kinds = {path: type(layer) for layers in held.values() for path, layer in layers.items()}
    specs = {}
    for path, cut in cuts.items():
        specs[path] = AdapterSpec(kinds[path], {"lora_A": cut.factors.lora_A, "lora_B": cut.factors.lora_B})
    rows = {path: tuple(spec.tensors["ids"].tolist()) for path, spec in saved.items() if "ids" in spec.tensors}
    modules = tuple(path for path, spec in saved.items() if spec.kind is ModulesToSave)
    combined = replace(config_of(cuts, task), modules_to_save=modules, trainable_token_indices=rows or None)
    inject_adapter(model, combined, name, specs | saved, trainable=False)
    return cuts


def _trained_in_full(layers: Mapping[str, AdapterWrapper], name: str) -> dict[str, AdapterSpec]:
    """Return copies of the modules and token rows that an adapter has trained, as specs by path."""
    tokens = {path: layer for path, layer in layers.items() if isinstance(layer, TrainableTokens)}
    owners = {layer.adapters[name]: path for path, layer in tokens.items() if name not in layer.shared}
    found = {}
    for path, layer in layers.items():
        adapter, tied_to = layer.adapters[name], None
        if isinstance(layer, ModulesToSave) and layer.is_whole(name):
            tensors = layer.peft_tensors(name)
        elif path in tokens:
            tied_to = None if owners[adapter] == path else owners[adapter]
            tensors = {} if tied_to else {"ids": adapter.ids, "rows": adapter.rows}
        else:
            continue
        copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        found[path] = AdapterSpec(type(layer), copies, tied_to)
    return found


def _is_update(adapter: nn.Module) -> bool:
    """Return whether an adapter is an update s·B A and nothing else, of numbers that are there."""
    return (
        isinstance(adapter, LoraAdapter)
        and adapter.magnitude is adapter.bias is adapter.lora_bias is None
        and not any(buffer.is_meta for buffer in adapter.buffers())
    )


def config_of(cuts: Mapping[str, LowRank], task_type: Task | None) -> LoraConfig:
    """Return the config of an adapter of scale 1, with alpha = r for each module."""
    ranks = {path: len(cut.factors.lora_A) for path, cut in cuts.items()}
    r = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    patterns: dict[str, Any] = {"rank_pattern": others, "alpha_pattern": others}
    return LoraConfig(r, r, target_modules=tuple(ranks), task_type=task_type, **patterns)
