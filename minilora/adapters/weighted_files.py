"""Several adapters on disk combined into one, each with a weight, without a model and for any architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from minilora.adapters.combine import Cut, Factors, check_additive, combine
from minilora.adapters.combine_config import CombineConfig
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import BASE, base_quantization, write_adapter
from minilora.adapters.layout import REPEATED, WEIGHTS_FILE, factor_name, fields_of, parse_tensor_name
from minilora.adapters.stored import Stored, read_adapter
from minilora.adapters.weighted import config_of
from minilora.errors import ConfigError
from minilora.models.hub import unpinned
from minilora.storage import TensorFile


def combine_directories(
    adapters: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    config: CombineConfig | None = None,
    base_model: str | None = None,
) -> dict[str, Cut]:
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
    factors = {path: cut.factors for path, cut in cuts.items()}
    base, revision = unpinned(base_model or "")
    new = config_of(factors, configs[0])  # names its modules in full: what else a model has is not known
    fields = fields_of(new) | {"target_modules": list(new.target_modules)}
    fields |= {"base_model_name_or_path": base or None, "revision": revision}
    fields["fan_in_fan_out"] = any(stored.values.get("fan_in_fan_out") for stored in every)
    held = [base_quantization(path) for path in adapters]
    is_told = held[0] is not None and all(each == held[0] for each in held)
    tensors = _tensors(factors, {path for stored in every for path in _embeddings(stored)})
    write_adapter(out, fields, tensors, {BASE: json.dumps(held[0])} if is_told else {})
    return cuts


def _checked_config(stored: Stored) -> LoraConfig:
    """Return the config of an adapter that consists of updates ΔW = s·B A alone."""
    config = stored.config()
    check_additive(str(stored.path), config)
    if (init := stored.values.get("init_lora_weights")) in REPEATED:
        raise ConfigError(
            f"{stored.path}: init_lora_weights is {init!r}, so its numbers hold a part of the base's weights; loaded "
            "with its base and saved again it is a plain adapter"
        )
    others = {path: held.keys() - {"lora_A", "lora_B", "weight"} for path, held in stored.tensors.items()}
    if strange := [f"{path or 'the model'} {sorted(keys)}" for path, keys in others.items() if keys]:
        raise ConfigError(f"{stored.path}: holds more than updates of low rank: {strange[:5]}")
    return config


def _embeddings(stored: Stored) -> set[str]:
    """Return the paths of the modules whose factors are named as those of embeddings."""
    return {
        parse_tensor_name(name)[0]
        for name in TensorFile(stored.path / WEIGHTS_FILE).shapes
        if ".lora_embedding_" in name
    }


def _tensors(factors: Mapping[str, Factors], embeddings: set[str]) -> dict[str, Tensor]:
    """Return the tensors by their names in the file."""
    return {
        factor_name(path, key, path in embeddings): getattr(pair, key)
        for path, pair in factors.items()
        for key in ("lora_A", "lora_B")
    }
