"""Several adapters on disk, each with a weight, as one: no model is needed, and every architecture will do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from minilora.adapters.combine import Cut, Factors, check_additive, combine
from minilora.adapters.combine_config import CombineConfig
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import BASE, base_quantization, write_adapter
from minilora.adapters.layout import REPEATED, WEIGHTS_FILE, factor_name, fields_of, understood
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
    """Write one adapter out of several, as `combine_adapters` makes it; `base_model` is the model that it is for.

    How the base was held in training is written if all of them tell the same.

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
    """The config of an adapter that is a sum of updates and nothing else."""
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
    """Paths of the modules whose factors have the names that those of embeddings have."""
    return {understood(name)[0] for name in TensorFile(stored.path / WEIGHTS_FILE).shapes if ".lora_embedding_" in name}


def _tensors(factors: Mapping[str, Factors], embeddings: set[str]) -> dict[str, Tensor]:
    """Name in the file -> tensor."""
    return {
        factor_name(path, key, path in embeddings): getattr(pair, key)
        for path, pair in factors.items()
        for key in ("lora_A", "lora_B")
    }
