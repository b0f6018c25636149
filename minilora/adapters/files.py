"""Save the adapters of a model in PEFT's layout, and load them (see `layout`)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minilora.adapter import PEFT_NAMES, PREFIX, base_modules, layers_of
from minilora.adapters.attach import config_of_adapter, describe_base, inject_adapter
from minilora.adapters.build import LINEARS, AdapterSpec, build_specs, kind_of
from minilora.adapters.config import LoraConfig
from minilora.adapters.copies import ModulesToSave, TrainableTokens
from minilora.adapters.initialize import factors_from_weight
from minilora.adapters.layers import (
    InitSubtractedAdapter,
    LoraConv1D,
    LoraEmbedding,
    LowRankWrapper,
    as_matrix,
    factor_shapes,
)
from minilora.adapters.layout import (
    BASE_METADATA,
    CONFIG_FILE,
    DETERMINISTIC_INITS,
    FIELD_OF_TENSOR,
    WEIGHTS_FILE,
    Stored,
    check_language_task,
    fields_of,
    is_name,
    read_adapter,
    write_adapter,
)
from minilora.errors import FormatError, TargetError, check_types, listed
from minilora.files import publishing
from minilora.llama import Llama
from minilora.lora import AdapterWrapper
from minilora.models.bitsandbytes import shortest_names
from minilora.models.hub import fetch, unpinned
from minilora.models.shard import whole_weight
from minilora.nf4 import NF4Linear

EMBEDDING_NAMES = PEFT_NAMES | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
T = TypeVar("T")


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT, vLLM and `load_adapter` read.

    `base_model_name_or_path` is the model's `name_or_path`, if it has one, and `revision` the commit of a model from
    the hub. The metadata of the tensors' file records how the base's weights are stored, dense or quantized. An adapter
    that began as a part of the weights is written as a plain one of twice the rank.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    check_types(save_adapter, locals())
    with publishing(Path(path)) as directory:
        save_adapter_files(model, directory, name)


def save_adapter_files(model: nn.Module, directory: Path, name: str = "default") -> None:
    """Write the files of `save_adapter` into a new directory."""
    layers = layers_of(model, name)
    base, revision = unpinned(getattr(model, "name_or_path", None) or "")
    fields = {"base_model_name_or_path": base or None, "revision": revision}
    fields |= _fields(config_of_adapter(model, name), name, layers, list(base_modules(model)))
    metadata = {BASE_METADATA: json.dumps(describe_base(model))}
    tensors = {f"{PREFIX}{where}.{key}": t for where in layers for key, t in peft_tensors(layers[where], name).items()}
    write_adapter(directory, fields, tensors, metadata)


def peft_tensors(layer: AdapterWrapper, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the ends of their names in PEFT's file, after the module's path."""
    if isinstance(layer, ModulesToSave | TrainableTokens):
        return layer.peft_tensors(name)
    held = {end: getattr(layer.adapters[name], key) for key, end in _names_of(type(layer)).items()}
    return {end: tensor for end, tensor in held.items() if tensor is not None}


def _names_of(kind: type[AdapterWrapper]) -> Mapping[str, str]:
    return EMBEDDING_NAMES if kind is LoraEmbedding else PEFT_NAMES


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Read an adapter that PEFT or `save_adapter` wrote, attach it to the model and activate it.

    Everything else is frozen, other adapters too, and the loaded adapter unless it is `trainable`.

    Args:
        model: the base model.
        path: the adapter's directory, or a repository of the hub, "org/name" or "org/name@revision".
        name: the adapter's name in the model.
        trainable: whether the adapter will be trained.

    Raises:
        FormatError: a file of the adapter is missing or malformed, or the config asks for something that is not
            supported.
        ConfigError: it is a classifier's, and the model a `Llama`.
        TargetError: the model lacks modules that the adapter adapts, or has them in other shapes; the first two are
            named, with both shapes.
    """
    check_types(load_adapter, locals())
    config, specs = stored_specs(model, path)
    inject_adapter(model, config, name, specs, None, trainable)


def stored_specs(model: nn.Module, name_or_path: str | Path) -> tuple[LoraConfig, dict[str, AdapterSpec]]:
    """Return the config of a stored adapter, and its specs for a model by path.

    The file must hold exactly the tensors that the config asks for, in the shapes that the model needs.

    Raises:
        FormatError: config and tensors contradict each other.
        ConfigError: a classifier's adapter on a `Llama`.
        TargetError: the model has no such modules, or others in shape; the first two are named, with both shapes.
    """
    stored, modules = read_adapter(fetch(name_or_path, "adapter")), base_modules(model)
    held = {where: dict(tensors) for where, tensors in stored.tensors.items()}
    config, init = stored.config(), stored.values.get("init_lora_weights")
    if isinstance(model, Llama):
        check_language_task(stored.path, config)
    config = replace(config, modules_to_save=_saved(held.get("", {}), config.modules_to_save))
    embedding = next((path for path in held if "rows" in held[path]), None)
    if config.trainable_token_indices and embedding is None:
        found = f"trainable_token_indices: found {config.trainable_token_indices}"
        raise _contradiction(stored, [f"{found}, and there are no rows"])
    specs = build_specs(modules, config, _blank_specs(held, modules, config), embedding)
    mismatches, contradictions = list[str](), list[str]()
    own = held.pop("", {})
    for path, spec in specs.items():
        if spec.kind is ModulesToSave:
            tensors = {key: own.pop(f"{path}.{key}") for key in spec.tensors if f"{path}.{key}" in own}
        else:
            tensors = held.pop(path, {})
        copied = tensors.pop("weight", None) if issubclass(spec.kind, LowRankWrapper) else None
        mismatches += _mismatches(path, spec, tensors, modules[path], copied)
        contradictions += _contradictions(path, spec, tensors, config)
        # PEFT takes the word for True on other layers
        if spec.kind in LINEARS and init in DETERMINISTIC_INITS and not mismatches:
            if isinstance(modules[path], NF4Linear):
                raise TargetError(f"{stored.path}: {init} starts from the dense weight, and {path} is in four bits")
            weight = as_matrix(modules[path], whole_weight(modules[path]))
            start = factors_from_weight(init, weight, config.rank(path), config.scale(path), torch.Generator())
            tensors["start_A"], tensors["start_B"] = start
        specs[path] = spec._replace(tensors=spec.tensors | tensors)
    missing = [path for path in held if kind_of(modules.get(path)) is None]
    mismatches += [f"{path}: the model has no such layer" for path in missing]
    mismatches += [
        f"{name}: is no part of an adapter that the config describes" for name in (*own, *held) if name not in missing
    ]
    if mismatches:
        base = stored.values.get("base_model_name_or_path")
        of_base = f"; it was trained on {base!r:.200}" if base else ""
        raise TargetError(f"{stored.path} does not fit the model{of_base}:{listed(mismatches, most=2)}")
    if contradictions:
        raise _contradiction(stored, contradictions)
    return config, specs


def _fields(config: LoraConfig, name: str, layers: Mapping[str, AdapterWrapper], modules: list[str]) -> dict[str, Any]:
    """Return what the JSON says of an adapter. A start doubles r, and α with it so that s stays."""
    low_rank = {where: layer for where, layer in layers.items() if isinstance(layer, LowRankWrapper)}
    started = {where for where, layer in low_rank.items() if isinstance(layer.adapters[name], InitSubtractedAdapter)}
    times = 2 if started else 1
    growth = math.sqrt(times) if config.use_rslora else times
    ranks = {each: config.rank(each) * (times if each in started else 1) for each in low_rank}
    alphas = {each: config.alpha(each) * (growth if each in started else 1) for each in low_rank}
    copies = [where for where, layer in layers.items() if isinstance(layer, ModulesToSave)]
    whole = [where for where in copies if peft_tensors(layers[where], name).keys() != {"bias"}]
    return {
        **fields_of(config),
        "target_modules": shortest_names(list(low_rank), modules),
        "r": times * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": _pattern(None if started else config.rank_pattern, ranks, times * config.r),
        "alpha_pattern": _pattern(None if started else config.alpha_pattern, alphas, growth * config.lora_alpha),
        "fan_in_fan_out": any(isinstance(layer, LoraConv1D) for layer in low_rank.values()),
        "modules_to_save": shortest_names(whole, modules, as_text=True) or None,  # as PEFT compares them
    }


def _pattern(pattern: Mapping[str, T] | None, values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return a pattern whose keys are names, as `load_adapter` requires: the given one, or one key for each module."""
    if pattern is not None and all(map(is_name, pattern)):
        return dict(pattern)
    return {f"^{where}": value for where, value in values.items() if value != default}


def _saved(own: Iterable[str], entries: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the modules that a file holds in full; PEFT matches the ends of their paths as text.

    An entry that matches nothing is kept, so that it is reported as missing.
    """
    paths = []
    for name in own:
        prefixes = itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")
        paths += [path for path in prefixes if path.endswith(tuple(entries))][:1]
    return (*dict.fromkeys(paths), *(entry for entry in entries if not any(path.endswith(entry) for path in paths)))


def _blank_specs(
    held: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Any], config: LoraConfig
) -> dict[str, AdapterSpec]:
    """Return the low-rank specs that the config asks for, with tensors on the device "meta"."""
    specs: dict[str, AdapterSpec] = {}
    for path, tensors in held.items():
        if "lora_A" not in tensors or (kind := kind_of(modules.get(path))) is None:
            continue
        shape_A, shape_B = factor_shapes(modules[path], config.rank(path))
        has_bias = "bias" in tensors and modules[path]._parameters.get("bias") is not None
        asked = {"magnitude": config.use_dora, "lora_bias": config.lora_bias, "bias": has_bias}
        shapes: dict[str, tuple[int, ...]] = {"lora_A": shape_A, "lora_B": shape_B}
        shapes |= dict.fromkeys(("magnitude", "lora_bias", "bias"), shape_B[:1])
        keys = [key for key in PEFT_NAMES if asked.get(key, True)]
        specs[path] = AdapterSpec(kind, {key: torch.empty(shapes[key], device="meta") for key in keys})
    return specs


def _mismatches(
    path: str, spec: AdapterSpec, held: Mapping[str, Tensor], module: Any, copied: Tensor | None
) -> list[str]:
    """Return what does not fit the model; `copied` is the file's copy of the base weight, if it has one."""
    shapes = {key: tuple(tensor.shape) for key, tensor in held.items()}
    needed = {key: tuple(tensor.shape) for key, tensor in spec.tensors.items()}
    wrong = [key for key in shapes if key in needed and shapes[key] != needed[key]]
    found = [f"{path}.{key}: the adapter has {shapes[key]}, the model needs {needed[key]}" for key in wrong]
    if issubclass(spec.kind, LowRankWrapper) and {"lora_A", "lora_B"} & {*wrong}:
        factors = f"A {shapes['lora_A']} and B {shapes['lora_B']}"
        found = [f"{path}: the adapter has {factors}, the model's weight is {tuple(module.weight.shape)}"]
    if copied is not None:
        weight = module.weight
        is_equal = copied.shape == weight.shape
        if is_equal and not weight.is_meta:  # as in a dry run, which has no numbers to compare
            is_equal = torch.equal(copied.to(weight.device, weight.dtype), weight)
        if not is_equal:
            found.append(f"{path}.base_layer.weight is not the weight of this model")
    unknown = [key for key in held if key not in needed and key not in ("magnitude", "lora_bias")]
    return found + [f"{path}.{key}: is no part of an adapter that the config describes" for key in unknown]


def _contradictions(path: str, spec: AdapterSpec, held: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    """Return the contradictions between what the config says is trained and what the file has."""
    if spec.kind is ModulesToSave and spec.tensors.keys() != {"bias"}:
        return [f"modules_to_save: means {path}, of which there is no {key}" for key in spec.tensors if key not in held]
    return [
        f"{field}: found {getattr(config, field)!r}, and {path} has {'a' if key in held else 'no'} {key}"
        for key, field in FIELD_OF_TENSOR.items()
        if (key in held) != (key in spec.tensors)
    ]


def _contradiction(stored: Stored, contradictions: Sequence[str]) -> FormatError:
    return FormatError(f"{stored.path / CONFIG_FILE}: does not go with {WEIGHTS_FILE}:{listed(contradictions, most=2)}")
