"""Weighted sums of adapters: a new adapter of a model from those it has, or a directory from several directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from minilora.adapter import layers_of
from minilora.adapters.attach import config_of_adapter, inject_adapter
from minilora.adapters.build import AdapterSpec
from minilora.adapters.combine import CombineConfig, Factors, LowRank, check_additive, combine
from minilora.adapters.config import LoraConfig
from minilora.adapters.layout import (
    BASE_METADATA,
    DETERMINISTIC_INITS,
    WEIGHTS_FILE,
    Stored,
    base_quantization,
    factor_name,
    fields_of,
    parse_tensor_name,
    read_adapter,
    write_adapter,
)
from minilora.errors import ConfigError, check_types
from minilora.files import TensorFile
from minilora.lora import LoraAdapter
from minilora.models.hub import unpinned


def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, config: CombineConfig | None = None
) -> dict[str, LowRank]:
    """Combine several adapters, each with a weight, into a new one, and activate it; the others stay as they are.

    The new adapter is frozen. Return the new factors and what an SVD has cut off, by path.

    Raises:
        ConfigError: an adapter is more than a sum of updates (`check_additive`), or `config` needs something else.
        ShapeError: adapters of one module do not fit together.
        TargetError: there is no such adapter, or one of the new name already.
    """
    check_types(combine_adapters, locals())
    places = {each: layers_of(model, each) for each in weights}
    configs = {each: config_of_adapter(model, each) for each in weights}
    for each in weights:
        check_additive(each, configs[each])
    parts = [{path: _factors(layer.adapters[n]) for path, layer in layers.items()} for n, layers in places.items()]
    cuts = combine(parts, list(weights.values()), config)
    factors = {path: cut.factors for path, cut in cuts.items()}
    kinds = {path: type(layer) for layers in places.values() for path, layer in layers.items()}
    specs = {path: AdapterSpec(kinds[path], {"lora_A": A, "lora_B": B}) for path, (A, B, _) in factors.items()}
    dtype = next(iter(factors.values())).lora_A.dtype
    inject_adapter(model, config_of(factors, configs[next(iter(weights))]), name, specs, dtype, trainable=False)
    return cuts


def _factors(adapter: LoraAdapter) -> Factors:
    return Factors(adapter.lora_A, adapter.lora_B, adapter.scale)


def config_of(factors: Mapping[str, Factors], like: LoraConfig | None = None) -> LoraConfig:
    """Return the config of an adapter of scale 1, with alpha = r for each module, and the task of another config."""
    ranks = {path: lora_A.size(0) for path, (lora_A, _, _) in factors.items()}
    r = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    task = like.task_type if like else "CAUSAL_LM"
    targets = tuple(ranks)
    return LoraConfig(r, r, target_modules=targets, rank_pattern=others, alpha_pattern=others, task_type=task)


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
    configs = [_checked_config(stored) for stored in every]
    cuts = combine([stored.factors() for stored in every], weights, config)
    base, revision = unpinned(base_model or "")
    new = config_of({path: cut.factors for path, cut in cuts.items()}, configs[0])
    fields = fields_of(new) | {"target_modules": list(new.target_modules)}  # full paths: the model is not known
    fields |= {"base_model_name_or_path": base or None, "revision": revision}
    fields["fan_in_fan_out"] = any(stored.values.get("fan_in_fan_out") for stored in every)
    held = [base_quantization(path) for path in adapters]
    is_known = held[0] is not None and all(each == held[0] for each in held)
    names = [name for path in adapters for name in TensorFile(path / WEIGHTS_FILE).shapes]
    embeddings = {parse_tensor_name(name)[0] for name in names if ".lora_embedding_" in name}
    tensors = {
        factor_name(path, key, path in embeddings): getattr(cut.factors, key)
        for path, cut in cuts.items()
        for key in ("lora_A", "lora_B")
    }
    write_adapter(out, fields, tensors, {BASE_METADATA: json.dumps(held[0])} if is_known else {})
    return cuts


def _checked_config(stored: Stored) -> LoraConfig:
    """Return the config of an adapter; raise a ConfigError unless it consists of updates ΔW = s·B A alone."""
    config = stored.config()
    check_additive(str(stored.path), config)
    if (init := stored.values.get("init_lora_weights")) in DETERMINISTIC_INITS:
        raise ConfigError(
            f"{stored.path}: init_lora_weights is {init!r}, so its numbers hold a part of the base's weights; loaded "
            "with its base and saved again it is a plain adapter"
        )
    others = {path: held.keys() - {"lora_A", "lora_B", "weight"} for path, held in stored.tensors.items()}
    if strange := [f"{path or 'the model'} {sorted(keys)}" for path, keys in others.items() if keys]:
        raise ConfigError(f"{stored.path}: holds more than updates of low rank: {strange[:5]}")
    return config
