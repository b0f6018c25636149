"""Save the adapters of a model in PEFT's layout, and load them (see `layout`)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minilora.adapter import PEFT_NAMES, PREFIX, base_modules, layers_of
from minilora.adapters.attach import config_of_adapter, describe_base, inject_adapter, path_of
from minilora.adapters.build import LINEARS, AdapterSpec, build_specs, factor_shapes, kind_of
from minilora.adapters.config import LoraConfig
from minilora.adapters.initialize import factors_from_weight
from minilora.adapters.layers import InitSubtractedAdapter, LoraConv1D, LoraEmbedding, LowRankWrapper, as_matrix
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
from minilora.adapters.modules_to_save import ModulesToSave, TrainableTokens
from minilora.errors import FormatError, TargetError, check_types, listed
from minilora.files import publishing
from minilora.llama import Llama
from minilora.lora import AdapterWrapper, LoraAdapter
from minilora.models.bitsandbytes import shortest_names
from minilora.models.fsdp import whole_weight
from minilora.models.hub import fetch, unpinned
from minilora.nf4 import NF4Linear

LINEAR_NAMES = PEFT_NAMES | {"lora_bias": "lora_B.bias", "bias": "base_layer.bias"}
EMBEDDING_NAMES = LINEAR_NAMES | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
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
    ends = EMBEDDING_NAMES if isinstance(layer, LoraEmbedding) else LINEAR_NAMES
    held = {end: getattr(layer.adapters[name], key) for key, end in ends.items()}
    return {end: tensor for end, tensor in held.items() if tensor is not None}


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Read an adapter that PEFT or `save_adapter` wrote, attach it to the model and activate it.

    Everything else is frozen, other adapters too. Unless the adapter is `trainable`, it is frozen as well, and the
    model is put into evaluation mode, so that no dropout acts.

    Args:
        model: the base model.
        path: the adapter's directory, or a repository of the hub, "org/name" or "org/name@revision".
        name: the adapter's name in the model.
        trainable: whether the adapter will be trained.
        dtype: of the adapter's parameters; by default the file's, float32 at least.

    Raises:
        FormatError: a file of the adapter is missing or malformed, or the config asks for something that is not
            supported, or for other tensors than there are.
        ConfigError: it is a classifier's, and the model a `Llama`.
        TargetError: the model lacks modules that the adapter adapts, or has them in other shapes; the first two are
            named, with both shapes.
    """
    check_types(load_adapter, locals())
    stored, modules = read_adapter(fetch(path, "adapter")), base_modules(model)
    config = stored.config()
    if isinstance(model, Llama):
        check_language_task(stored.path, config)
    config = replace(config, modules_to_save=_saved(stored.tensors.get("", {}), config.modules_to_save))
    with_rows = (where for where, held in stored.tensors.items() if "rows" in held)
    embedding = path_of(model, "get_input_embeddings") or next(with_rows, None)
    specs = build_specs(modules, config, _blank_specs(stored, modules, config), embedding)
    if not any(spec.tied_to for spec in specs.values()):  # PEFT also writes it where nothing or A and B are tied
        config = replace(config, ensure_weight_tying=False)
    specs = _filled(specs, stored, modules, config)
    if dtype is not None:
        specs = {where: spec.copied(dtype) for where, spec in specs.items()}
    inject_adapter(model, config, name, specs, trainable)
    if not trainable:
        model.eval()


def _blank_specs(stored: Stored, modules: Mapping[str, Any], config: LoraConfig) -> dict[str, AdapterSpec]:
    """Return the low-rank specs that the config asks for, with tensors on the device "meta"."""
    specs: dict[str, AdapterSpec] = {}
    for path, tensors in stored.tensors.items():
        if "lora_A" not in tensors or (kind := kind_of(modules.get(path))) is None:
            continue
        shape_A, shape_B = factor_shapes(modules[path], config.rank(path))
        has_bias = "bias" in tensors and modules[path]._parameters.get("bias") is not None
        asked = {"magnitude": config.use_dora, "lora_bias": config.lora_bias, "bias": has_bias}
        shapes = {"lora_A": shape_A, "lora_B": shape_B, **{key: shape_B[:1] for key in asked if asked[key]}}
        specs[path] = AdapterSpec(kind, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    return specs


def _filled(
    specs: Mapping[str, AdapterSpec], stored: Stored, modules: Mapping[str, Any], config: LoraConfig
) -> dict[str, AdapterSpec]:
    """Return the specs with the tensors of the file, which must be those that are asked for, in these shapes.

    Raises:
        TargetError: the model has no such module, or another shape or weight; the first two are named.
        FormatError: config and tensors contradict each other.
    """
    copied = {where: held["weight"] for where, held in stored.tensors.items() if "weight" in held and where}
    held = {
        f"{where}.{key}".removeprefix("."): tensor
        for where, tensors in stored.tensors.items()
        for key, tensor in tensors.items()
        if not (where and key == "weight")
    }
    needed = {
        f"{path}.{key}": tuple(tensor.shape)
        for path, spec in specs.items()
        for key, tensor in spec.tensors.items()
        if key != "ids"
    }
    misfits = [
        f"{where}: the model has no such layer"
        for where in stored.tensors
        if where and where not in specs and kind_of(modules.get(where)) is None
    ]
    for name in held.keys() & needed.keys():
        if (shape := tuple(held[name].shape)) != needed[name]:
            misfits.append(f"{name}: the adapter has {shape}, the model needs {needed[name]}")
    for where, weight in copied.items():
        if where not in specs or not _is_weight_of(modules[where], weight):
            misfits.append(f"{where}.base_layer.weight is not the weight of this model")
    if misfits:
        base = stored.values.get("base_model_name_or_path")
        of_base = f"; it was trained on {base!r:.200}" if base else ""
        raise TargetError(f"{stored.path} does not fit the model{of_base}:{listed(sorted(misfits), most=2)}")
    wrong = [f"{name} is not asked for{_asked_by(name, config)}" for name in sorted(held.keys() - needed)]
    wrong += [f"there is no {name}{_asked_by(name, config)}" for name in sorted(needed.keys() - held)]
    if wrong:
        raise FormatError(f"{stored.path / CONFIG_FILE}: does not go with {WEIGHTS_FILE}:{listed(wrong, most=4)}")
    filled = {}
    for path, spec in specs.items():
        tensors = {key: held.get(f"{path}.{key}", tensor) for key, tensor in spec.tensors.items()}
        init = stored.values.get("init_lora_weights")
        if spec.kind in LINEARS and init in DETERMINISTIC_INITS:  # PEFT takes the word for True on other layers
            if isinstance(modules[path], NF4Linear):
                raise TargetError(f"{stored.path}: {init} starts from the dense weight, and {path} is in four bits")
            weight = as_matrix(modules[path], whole_weight(modules[path]))
            start = factors_from_weight(init, weight, config.rank(path), config.scale(path))
            tensors["start_A"], tensors["start_B"] = start
        is_tied = spec.kind is ModulesToSave and spec.tied_to is not None
        if is_tied and not torch.equal(tensors["weight"], held[f"{spec.tied_to}.weight"]):
            raise FormatError(f"{stored.path}: ensure_weight_tying: {path} and {spec.tied_to} have other weights")
        filled[path] = spec._replace(tensors=tensors)
    return filled


def _asked_by(name: str, config: LoraConfig) -> str:
    """Return which field of the config asks for a tensor, or should, for the end of a message."""
    field = FIELD_OF_TENSOR.get(name.rpartition(".")[2], "modules_to_save")
    return f"; {field} is {getattr(config, field)!r:.80}"


def _is_weight_of(module: Any, copy: Tensor) -> bool:
    """Return whether a file's copy of a base weight is the module's; on "meta", as in a dry run, only by its shape."""
    weight = module.weight
    is_equal = copy.shape == weight.shape
    return is_equal and (weight.is_meta or torch.equal(copy.to(weight.device, weight.dtype), weight))


def _fields(config: LoraConfig, name: str, layers: Mapping[str, AdapterWrapper], modules: list[str]) -> dict[str, Any]:
    """Return what the JSON says of an adapter. A start doubles r, and α with it so that s stays."""
    low_rank = {where: layer for where, layer in layers.items() if isinstance(layer, LowRankWrapper)}
    adapters = {where: layer.adapters[name] for where, layer in low_rank.items()}
    times = 2 if any(isinstance(adapter, InitSubtractedAdapter) for adapter in adapters.values()) else 1
    growth = math.sqrt(times) if config.use_rslora else times
    ranks = {where: len(adapter.lora_A) for where, adapter in adapters.items()}
    alphas = {where: _alpha(config, where, adapter) for where, adapter in adapters.items()}
    whole = [where for where, layer in layers.items() if isinstance(layer, ModulesToSave) and layer.is_whole(name)]
    return {
        **fields_of(config),
        "target_modules": shortest_names(list(low_rank), modules),
        "r": times * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": _pattern(config.rank_pattern, config.rank, ranks, times * config.r),
        "alpha_pattern": _pattern(config.alpha_pattern, config.alpha, alphas, growth * config.lora_alpha),
        "fan_in_fan_out": any(isinstance(layer, LoraConv1D) for layer in low_rank.values()),
        "modules_to_save": shortest_names(whole, modules, as_text=True) or None,  # as PEFT compares them
    }


def _alpha(config: LoraConfig, where: str, adapter: LoraAdapter) -> float:
    """Return the α that gives, with the adapter's rank, the scale that it has now, which a user may have set."""
    growth = len(adapter.lora_A) / config.rank(where)
    factor = adapter.scale / config.scale(where) * (math.sqrt(growth) if config.use_rslora else growth)
    return config.alpha(where) if factor == 1 else factor * config.alpha(where)


def _pattern(pattern: Mapping[str, T], meant: Callable[[str], T], values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return a pattern whose keys are names, as `load_adapter` requires: the given one, or one key for each module."""
    if all(map(is_name, pattern)) and all(meant(where) == value for where, value in values.items()):
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
