"""Adapters on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors` (see `layout`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.adapter import base_modules
from minilora.adapters.attach import inject_adapter
from minilora.adapters.config import LoraConfig
from minilora.adapters.copies import TrainedCopy
from minilora.adapters.find import base_held, places_of
from minilora.adapters.layers import AdapterConv1D
from minilora.adapters.layout import (
    CONFIG_FILE,
    PEFT_DEFAULTS,
    PREFIX,
    WEIGHTS_FILE,
    check_keys,
    config_from,
    fields_of,
    is_name,
    metadata_of,
    named,
)
from minilora.adapters.parameters import AdapterParameters
from minilora.adapters.parts import StartedAdapter
from minilora.adapters.stored import read_adapter, stored_specs
from minilora.errors import FormatError, TargetError, check_types
from minilora.lora import AdapterLinear, AdapterWrapper
from minilora.models.bitsandbytes import shortest_names
from minilora.models.config import UNITS, Unit
from minilora.models.hub import fetch, unpinned, with_revision
from minilora.nf4 import BLOCK_SIZES, CODEBOOKS
from minilora.storage import TensorFile, read_json, write_json, write_tensors

BASE, LABELS = "base_quantization", "labels"  # in the metadata of the weights' file


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT, vLLM and `load_adapter` read.

    `base_model_name_or_path` is the model's `name_or_path`, where it has one, and `revision` the commit of a model from
    the hub. How the base's weights are held, dense or quantized, is written into the metadata of the tensors' file,
    and so are the `labels` of a classifier of ours.
    An adapter that began as a part of the weights is written as a plain one of twice the rank.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    check_types(save_adapter, locals())
    layers = places_of(model, name)
    if not layers:
        raise TargetError(f"the model has no adapter {name!r} to save")
    tensors = {
        f"{PREFIX}{where}.{key}": tensor
        for where, layer in layers.items()
        for key, tensor in layer.peft_tensors(name).items()
    }
    base, revision = unpinned(getattr(model, "name_or_path", None) or "")
    fields = {"base_model_name_or_path": base or None, "revision": revision}
    fields |= _fields(next(iter(layers.values())).configs[name], name, layers, list(base_modules(model)))
    metadata = {BASE: json.dumps(base_held(model))}
    if labels := _labels(getattr(model, "labels", None)):
        metadata[LABELS] = json.dumps(labels)
    write_adapter(Path(path), fields, tensors, metadata)


def write_adapter(
    directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the two files: PEFT's defaults with these fields, sorted like PEFT's, and the tensors."""
    write_tensors(directory / WEIGHTS_FILE, tensors, metadata)
    # The patterns inside the fields keep their order: the first key that matches counts.
    write_json(directory / CONFIG_FILE, dict(sorted({**PEFT_DEFAULTS, **fields}.items())))


def _fields(config: LoraConfig, name: str, layers: Mapping[str, AdapterWrapper], modules: list[str]) -> dict[str, Any]:
    """What the JSON says of an adapter. A start doubles r, and α with it so that s stays."""
    low_rank = {where: layer for where, layer in layers.items() if isinstance(layer, AdapterLinear)}
    copies = {where: layer for where, layer in layers.items() if isinstance(layer, TrainedCopy)}
    whole = [where for where, layer in copies.items() if set(layer.peft_tensors(name)) != {"bias"}]
    stacked = {where: layer.adapters[name] for where, layer in layers.items() if isinstance(layer, AdapterParameters)}
    times = {where: 2 if isinstance(layer.adapters[name], StartedAdapter) else 1 for where, layer in low_rank.items()}
    times |= {f"{where}.{key}": 1 for where, held in stacked.items() for key in held}
    more = max(times.values(), default=1)
    growths = {n: math.sqrt(n) if config.use_rslora else n for n in (1, 2)}
    growth, is_even = growths[more], len({*times.values()}) <= 1  # else a pattern cannot say which are doubled
    ranks = {where: n * config.rank(where) for where, n in times.items()}
    alphas = {where: growths[n] * config.alpha(where) for where, n in times.items()}
    rank_pattern = {key: more * r for key, r in config.rank_pattern.items()} if is_even else None
    alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()} if is_even else None
    return {
        **fields_of(config),
        "target_modules": shortest_names(list(low_rank), modules),
        "r": more * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": named(rank_pattern, ranks, more * config.r),
        "alpha_pattern": named(alpha_pattern, alphas, growth * config.lora_alpha),
        "fan_in_fan_out": any(isinstance(layer, AdapterConv1D) for layer in low_rank.values()),
        "modules_to_save": _ends(whole, modules) or None,
    }


def _ends(chosen: list[str], modules: list[str]) -> list[str]:
    """Last names for some of the modules (paths), or the paths: PEFT takes "norm" for the end of "input_layernorm"."""
    names = {path.rpartition(".")[2] for path in chosen}
    meant = {path for path in modules if path.endswith(tuple(names))}
    return sorted(names) if meant == set(chosen) else sorted(chosen)


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Read an adapter that PEFT or `save_adapter` wrote, attach it to the model and activate it.

    `path` is its directory, or a repository of the hub, "org/name" or "org/name@revision".
    Everything else is frozen, other adapters too; with `trainable` the loaded one is what trains.

    Raises:
        FormatError: the adapter or a file of it is missing or malformed, or the config asks for something that is not
            a LoRA that minilora knows.
        TargetError: the adapter adapts modules that the model does not have, or has in other shapes; all of them are
            named, with both shapes.
    """
    check_types(load_adapter, locals())
    stored = read_adapter(fetch(path, "adapter"))
    config, parts = stored_specs(stored, base_modules(model))
    inject_adapter(model, config, name, parts, None, trainable)


def base_model_of(path: str | Path) -> str | None:
    """The model that an adapter was made for, as `load_model` takes it, with its revision; None if none is named.

    Raises:
        FormatError: there is no such adapter, or its config is not JSON.
    """
    values = read_json(fetch(path, "adapter") / CONFIG_FILE)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    return with_revision(base, revision) if isinstance(base, str) and base else None


def vocabulary_of(path: str | Path) -> int:
    """How many rows an embedding needs for the tokens that an adapter trained; 0 if it trained none.

    Raises:
        FormatError: there is no such adapter, or its config is malformed.
    """
    path = fetch(path, "adapter") / CONFIG_FILE
    values = read_json(path)
    check_keys(path, values)
    return config_from(path, values, {}).vocabulary


def classes_of(path: str | Path) -> tuple[Unit | None, tuple[str, ...]]:
    """Return what the adapter of a classifier gives a class to, and the names of the classes; None and () for others.

    PEFT does not write the names: they are LABEL_0, LABEL_1, … then, as in transformers.

    Raises:
        FormatError: there is no such adapter, it has no head of a classifier, or its names are malformed.
    """
    directory = fetch(path, "adapter")
    unit = UNITS.get(str(read_json(directory / CONFIG_FILE).get("task_type")))
    if unit is None:
        return None, ()
    file, head = TensorFile(directory / WEIGHTS_FILE), f"{PREFIX}score.weight"
    if head not in file.shapes:
        raise FormatError(f"{file.path}: there is no {head}, the head of a classifier")
    names = metadata_of(file, LABELS, _labels, "names of classes")
    return unit, names or tuple(f"LABEL_{i}" for i in range(file.shapes[head][0]))


def _labels(found: Any) -> tuple[str, ...] | None:
    """Names of classes; None if they are none."""
    is_names = isinstance(found, list | tuple) and len(found) > 1 and all(isinstance(label, str) for label in found)
    return tuple(found) if is_names else None


def base_quantization(path: str | Path) -> dict[str, Any] | None:
    """How the weights of its base were held when an adapter was saved, as `quant.files.describe` tells it.

    None if the file does not say, as those of PEFT do not.

    Raises:
        FormatError: there is no such adapter, or what it says is not understood.
    """
    return metadata_of(TensorFile(fetch(path, "adapter") / WEIGHTS_FILE), BASE, _held, "how a base is quantized")


def _held(told: Any) -> dict[str, Any] | None:
    """How a base was held, with no more than `describe` tells; None if it is not understood."""
    if told == {"quantize": "none"}:
        return {"quantize": "none"}
    found = {key: told[key] for key in ("quantize", "double_quant", "block_size", "quantize_skip")}
    is_known = found["quantize"] in CODEBOOKS and found["block_size"] in BLOCK_SIZES
    is_typed = isinstance(found["double_quant"], bool) and isinstance(found["quantize_skip"], list)
    if not (is_known and is_typed and all(map(is_name, found["quantize_skip"]))):
        return None
    return found | ({"head": told["head"]} if told.get("head") in CODEBOOKS else {})
