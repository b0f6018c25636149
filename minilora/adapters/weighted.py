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
from minilora.adapters.modules_to_save import ModulesToSave
from minilora.errors import ConfigError, check_types
from minilora.lora import LoraAdapter


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, config: CombineConfig | None = None
) -> dict[str, LowRank]:
    """Combine several adapters, each with a weight, into a new one, and activate it; the others stay as they are.

    The new adapter is frozen. A module that one of them has trained in full is carried over as it is, whatever the
    weight. Return the new factors and what an SVD has cut off, by path.

    Raises:
        ConfigError: an adapter has more than updates s·B A, which alone can be added, or two have one module in full.
        ShapeError: adapters of one module differ in rank, and "linear" cannot add them.
        TargetError: there is no such adapter, or one of the new name already.
    """
    check_types(combine_adapters, locals())
    held = {each: layers_of(model, each) for each in weights}
    task = config_of_adapter(model, next(iter(weights))).task_type if weights else None
    saved: dict[str, AdapterSpec] = {}
    for each, layers in held.items():
        copies = {path: layer for path, layer in layers.items() if isinstance(layer, ModulesToSave)}
        for path in [path for path, layer in copies.items() if layer.is_whole(each)]:
            if path in saved:
                raise ConfigError(f"{path}: several of {list(weights)} have trained it in full, and only one can act")
            tensors = layers.pop(path).peft_tensors(each)
            saved[path] = AdapterSpec(ModulesToSave, {key: t.detach().clone() for key, t in tensors.items()})
    adapters = [{path: layer.adapters[each] for path, layer in layers.items()} for each, layers in held.items()]
    for each, parts in zip(held, adapters, strict=True):
        if others := [path for path, adapter in parts.items() if not _is_update(adapter)]:
            raise ConfigError(
                f"{each}: cannot be combined with other adapters, or weighed: it has more than updates s·B A, which "
                "alone can be added, such as DoRA's m, trained biases and rows, or a part of weights that are not "
                f"loaded: {others[:5]}"
            )
    factors = [{path: Factors(a.lora_A, a.lora_B, a.scale) for path, a in parts.items()} for parts in adapters]
    cuts = combine(factors, list(weights.values()), config)
    kinds = {path: type(layer) for layers in held.values() for path, layer in layers.items()}
    specs = {}
    for path, cut in cuts.items():
        specs[path] = AdapterSpec(kinds[path], {"lora_A": cut.factors.lora_A, "lora_B": cut.factors.lora_B})
    combined = replace(config_of(cuts, task), modules_to_save=tuple(saved))
    inject_adapter(model, combined, name, specs | saved, trainable=False)
    return cuts


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
