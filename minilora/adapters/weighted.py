"""A new adapter of a model, combined from those that it has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minilora.adapter import adapter_layers
from minilora.adapters.attach import inject_adapter
from minilora.adapters.combine import Cut, Factors, check_additive, combine
from minilora.adapters.combine_config import CombineConfig
from minilora.adapters.config import LoraConfig
from minilora.adapters.find import known_adapters, places_of
from minilora.adapters.parts import AdapterSpec
from minilora.errors import check_types
from minilora.lora import LoraAdapter


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, config: CombineConfig | None = None
) -> dict[str, Cut]:
    """Combine several adapters, each with a weight, into a new one, and activate it; the others stay as they are.

    The new adapter is frozen. Returns what an SVD has cut off, path -> `Cut`.

    Raises:
        ConfigError: an adapter is more than a sum of updates (`check_additive`), or `config` needs something else.
        ShapeError: adapters of one module do not fit together.
        TargetError: there is no such adapter, or one of the new name already.
    """
    check_types(combine_adapters, locals())
    configs = known_adapters(adapter_layers(model).values(), weights)
    for each in weights:
        check_additive(each, configs[each])
    cuts = combine([factors_of(model, each) for each in weights], list(weights.values()), config)
    factors = {path: cut.factors for path, cut in cuts.items()}
    kinds = {path: type(layer) for each in weights for path, layer in places_of(model, each).items()}
    parts = {path: AdapterSpec(kinds[path], {"lora_A": A, "lora_B": B}) for path, (A, B, _) in factors.items()}
    dtype = next(iter(factors.values())).lora_A.dtype
    inject_adapter(model, config_of(factors, configs[next(iter(weights))]), name, parts, dtype, trainable=False)
    return cuts


def factors_of(model: nn.Module, name: str) -> dict[str, Factors]:
    """Return A, B and s of an adapter by path, where it is a plain LoRA; a subtracted start is concatenated to them."""
    held = {path: layer.adapters[name] for path, layer in places_of(model, name).items()}
    return {
        path: Factors(*adapter.factors(), adapter.scale)
        for path, adapter in held.items()
        if isinstance(adapter, LoraAdapter) and adapter.magnitude is None
    }


def config_of(factors: Mapping[str, Factors], like: LoraConfig | None = None) -> LoraConfig:
    """Return the config of an adapter of scale 1, with alpha = r for each module, and the task of another config."""
    ranks = {path: lora_A.size(0) for path, (lora_A, _, _) in factors.items()}
    r = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    task = like.task_type if like else "CAUSAL_LM"
    targets = tuple(ranks)
    return LoraConfig(r, r, target_modules=targets, rank_pattern=others, alpha_pattern=others, task_type=task)
