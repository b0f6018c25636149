"""Weighted sums of adapters: a new adapter of a model from those it has, or a directory from several directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from minilora.adapter import layers_of
from minilora.adapters.attach import config_of_adapter, inject_adapter
from minilora.adapters.build import AdapterSpec
from minilora.adapters.combine import CombineConfig, Factors, LowRank, combine
from minilora.adapters.config import LoraConfig, Task
from minilora.adapters.layout import (
    BASE_METADATA,
    DETERMINISTIC_INITS,
    Stored,
    base_quantization,
    factor_name,
    fields_of,
    read_adapter,
    write_adapter,
)
from minilora.errors import ConfigError, check_types
from minilora.lora import LoraAdapter
from minilora.models.hub import unpinned


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, config: CombineConfig | None = None
) -> dict[str, LowRank]:
    """Combine several adapters, each with a weight, into a new one, and activate it; the others stay as they are.

    The new adapter is frozen. Return the new factors and what an SVD has cut off, by path.

    Raises:
        ConfigError: an adapter has more than updates s·B A, which alone can be added.
        ShapeError: adapters of one module do not fit together.
        TargetError: there is no such adapter, or one of the new name already.
    """
    check_types(combine_adapters, locals())
    held = {each: layers_of(model, each) for each in weights}
    task = config_of_adapter(model, next(iter(weights))).task_type if weights else None
    adapters = [{path: layer.adapters[each] for path, layer in layers.items()} for each, layers in held.items()]
    for each, parts in zip(held, adapters, strict=True):
        _check_additive(each, [path for path, adapter in parts.items() if not _is_update(adapter)])
    factors = [{path: Factors(a.lora_A, a.lora_B, a.scale) for path, a in parts.items()} for parts in adapters]
    cuts = combine(factors, list(weights.values()), config)
    kinds = {path: type(layer) for layers in held.values() for path, layer in layers.items()}
    specs = {}
    for path, cut in cuts.items():
        specs[path] = AdapterSpec(kinds[path], {"lora_A": cut.factors.lora_A, "lora_B": cut.factors.lora_B})
    inject_adapter(model, config_of(cuts, task), name, specs, trainable=False)
    return cuts


def _is_update(adapter: nn.Module) -> bool:
    """Return whether an adapter is an update s·B A and nothing else."""
    return isinstance(adapter, LoraAdapter) and adapter.magnitude is adapter.bias is adapter.lora_bias is None


def _check_additive(name: str, others: Sequence[str]) -> None:
    if others:
        raise ConfigError(
            f"{name}: cannot be combined with other adapters, or weighed: it has more than updates s·B A, which alone "
            f"can be added, such as DoRA's m, biases, or modules and rows that are trained in full: {others[:5]}"
        )


def config_of(cuts: Mapping[str, LowRank], task_type: Task | None) -> LoraConfig:
    """Return the config of an adapter of scale 1, with alpha = r for each module."""
    ranks = {path: len(cut.factors.lora_A) for path, cut in cuts.items()}
    r = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    patterns: dict[str, Any] = {"rank_pattern": others, "alpha_pattern": others}
    return LoraConfig(r, r, target_modules=tuple(ranks), task_type=task_type, **patterns)


def combine_directories(
    adapters: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    config: CombineConfig | None = None,
    base_model: str | None = None,
) -> dict[str, LowRank]:
    """Combine adapters as `combine_adapters` does and write the result, an adapter of `base_model`.

    How the base was quantized in training is written if it is the same for all of them.

    Raises:
        FormatError: an adapter cannot be read.
        ConfigError, ShapeError: as of `combine_adapters`; or the numbers of an adapter mean something only together
            with those of its base.
    """
    every = [read_adapter(path) for path in adapters]
    cuts = combine([_factors_of(stored) for stored in every], weights, config)
    new = config_of(cuts, every[0].config().task_type)
    base, revision = unpinned(base_model or "")
    fields = fields_of(new) | {"target_modules": list(new.target_modules)}  # full paths: the model is not known
    fields |= {"base_model_name_or_path": base or None, "revision": revision}
    fields["fan_in_fan_out"] = any(stored.values.get("fan_in_fan_out") for stored in every)
    embeddings = {path for stored in every for path in stored.embeddings}
    tensors = {}
    for path, cut in cuts.items():
        tensors[factor_name(path, "lora_A", path in embeddings)] = cut.factors.lora_A
        tensors[factor_name(path, "lora_B", path in embeddings)] = cut.factors.lora_B
    held = [base_quantization(path) for path in adapters]
    is_known = held[0] is not None and all(each == held[0] for each in held)
    write_adapter(out, fields, tensors, {BASE_METADATA: json.dumps(held[0])} if is_known else {})
    return cuts


def _factors_of(stored: Stored) -> dict[str, Factors]:
    """Return A, B and s of a stored adapter by path; raise a ConfigError if it has anything else."""
    if (init := stored.values.get("init_lora_weights")) in DETERMINISTIC_INITS:
        raise ConfigError(
            f"{stored.path}: init_lora_weights is {init!r}, so its numbers hold a part of the base's weights; loaded "
            "with its base and saved again it is a plain adapter"
        )
    others = {path: held.keys() - {"lora_A", "lora_B", "weight"} for path, held in stored.tensors.items()}
    _check_additive(str(stored.path), [f"{path} {sorted(keys)}".strip() for path, keys in others.items() if keys])
    return stored.factors()
