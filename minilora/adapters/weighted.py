"""A new adapter of a model, out of those that it has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minilora.adapters.attach import place
from minilora.adapters.combine import Cut, Factors, check_additive, combine
from minilora.adapters.combine_config import CombineConfig
from minilora.adapters.config import LoraConfig
from minilora.adapters.find import adapter_layers, known_adapters, places_of
from minilora.adapters.layers import LoRA
from minilora.adapters.parts import Part


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, config: CombineConfig | None = None
) -> dict[str, Cut]:
    """Add one adapter out of several, each with a weight, and make it the active one; the others stay as they are.

    It is frozen. What comes back tells what an SVD has cut, path -> `Cut`.

    Raises:
        ConfigError: an adapter is more than a sum of updates (`check_additive`), or `config` needs something else.
        ShapeError: adapters of one module do not fit together.
        TargetError: there is no such adapter, or one of the new name already.
    """
    configs = known_adapters(adapter_layers(model).values(), weights)
    for each in weights:
        check_additive(each, configs[each])
    cuts = combine([factors_of(model, each) for each in weights], list(weights.values()), config)
    factors = {path: cut.factors for path, cut in cuts.items()}
    kinds = {path: type(layer) for each in weights for path, layer in places_of(model, each).items()}
    parts = {path: Part(kinds[path], {"lora_A": A, "lora_B": B}) for path, (A, B, _) in factors.items()}
    dtype = next(iter(factors.values())).lora_A.dtype
    place(model, config_of(factors, configs[next(iter(weights))]), name, parts, dtype, trainable=False)
    return cuts


def factors_of(model: nn.Module, name: str) -> dict[str, Factors]:
    """Path -> A, B and s of one adapter where it is a plain one; a start that is subtracted is a part of A and B."""
    held = {path: layer.adapters[name] for path, layer in places_of(model, name).items()}
    return {
        path: Factors(*adapter.factors(), adapter.scale) for path, adapter in held.items() if isinstance(adapter, LoRA)
    }


def config_of(factors: Mapping[str, Factors], like: LoraConfig | None = None) -> LoraConfig:
    """The config of an adapter of scale 1, of the task of another one: alpha is r, of each module."""
    ranks = {path: lora_A.size(0) for path, (lora_A, _, _) in factors.items()}
    r = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    task = like.task_type if like else "CAUSAL_LM"
    targets = tuple(ranks)
    return LoraConfig(r, r, target_modules=targets, rank_pattern=others, alpha_pattern=others, task_type=task)
