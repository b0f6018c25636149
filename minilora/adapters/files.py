"""Save the adapters of a model in PEFT's layout, and load them (see `layout`)."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapter import activate, adapter_tensors, base_modules, copy_tensors_, layers_of
from minilora.adapters import build, layout
from minilora.adapters.attach import inject_layers, path_of
from minilora.adapters.config import HEADS, LoraConfig
from minilora.adapters.initialize import factors_from_weight
from minilora.adapters.layers import InitSubtractedAdapter, LoraConv1D, LowRankWrapper
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, AdapterFile
from minilora.adapters.modules_to_save import ModulesToSave
from minilora.errors import ConfigError, FormatError, TargetError, TrainingError, in_recipe, listed
from minilora.files import publishing, write_json, write_tensors
from minilora.llama import Llama
from minilora.lora import AdapterWrapper, LoraAdapter, widest
from minilora.models.bitsandbytes import describe_quantization, is_finite, shortest_names
from minilora.models.hub import locate, unpinned
from minilora.nf4 import NF4Linear

TENSOR_FIELDS = ("use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices")


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT, vLLM and `load_adapter` read.

    `base_model_name_or_path` is the model's `name_or_path`, if it has one, and `revision` the commit of a model from
    the hub. The metadata of the tensors' file records how the base's weights are stored, dense or quantized. An adapter
    that began as a part of the weights is written as a plain one of twice the rank.

    Raises:
        TargetError: the model has no adapter of that name.
        TrainingError: a number is not finite, so that `load_adapter` would refuse it.
    """
    with publishing(Path(path)) as directory:
        save_adapter_files(model, directory, name)


def save_adapter_files(model: nn.Module, directory: Path, name: str = "default") -> None:
    """Write the files of `save_adapter` into a new directory."""
    layers = layers_of(model, name)
    base, revision = unpinned(getattr(model, "name_or_path", None) or "")
    fields = {"base_model_name_or_path": base or None, "revision": revision}
    fields |= _fields(config_of_adapter(layers, name), name, layers, list(base_modules(model)))
    tensors = adapter_tensors(layers, name)
    if bad := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise TrainingError(f"the adapter is not written, because {bad[0]} has numbers that are not finite")
    directory.mkdir(parents=True, exist_ok=True)
    base_metadata = {layout.BASE_METADATA: json.dumps(describe_quantization(model))}
    write_tensors(directory / WEIGHTS_FILE, tensors, base_metadata)
    # The patterns inside the fields keep their order: the first key that matches counts.
    write_json(directory / CONFIG_FILE, dict(sorted({**layout.PEFT_DEFAULTS, **fields}.items())))


def config_of_adapter(layers: Mapping[str, AdapterWrapper], name: str) -> LoraConfig:
    """Return the config that an adapter was made from; it is in each of the layers."""
    config: LoraConfig | None = getattr(next(iter(layers.values())).adapters[name], "lora_config", None)
    if config is None:
        raise TargetError(f"adapter {name!r} has no LoraConfig: attach it by `ml.attach`")
    return config


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Read an adapter that PEFT or `save_adapter` wrote, attach it to the model and activate it.

    Everything else is frozen, other adapters too. Unless the adapter is `trainable`, it is frozen as well, and the
    model is put into evaluation mode, so that no dropout acts. Its parameters have the file's dtype, float32 at least.

    Args:
        model: the base model.
        path: the adapter's directory, or a repository of the hub, "org/name" or "org/name@revision".
        name: the adapter's name in the model.
        trainable: whether the adapter will be trained.

    Raises:
        FormatError: a file of the adapter is missing or malformed, or the config asks for something that is not
            supported, or for other tensors than there are.
        ConfigError: it is a classifier's, and the model a `Llama`.
        TargetError: the model lacks modules that the adapter adapts, or has them in other shapes; the first two are
            named, with both shapes.
    """
    stored, modules = layout.read_adapter(locate(path, "adapter").path, isinstance(model, Llama)), base_modules(model)
    config = stored.config()
    if isinstance(model, Llama) and config.task_type in HEADS:
        task = f"task_type is {config.task_type}, not CAUSAL_LM"
        raise ConfigError(f"{stored.path}: {task}; {in_recipe('classify_texts')}")
    config = replace(config, modules_to_save=_saved(stored, config.modules_to_save))
    with_rows = (where for where, held in stored.tensors.items() if "rows" in held)
    embedding = path_of(model, "get_input_embeddings") or next(with_rows, None)
    dtype = widest(*(tensor for held in stored.tensors.values() for tensor in held.values()))
    layers = build.build_layers(modules, config, name, _blank_tensors(stored, modules, config), dtype, embedding)
    _copy_stored(stored, layers, modules, config, name)
    if (init := stored.values.get("init_lora_weights")) in layout.DETERMINISTIC_INITS:
        layers |= _restarted(layers, init, config, name)
    inject_layers(modules, layers, config, name)
    if not trainable:
        activate(model, name, trainable=False)
        model.eval()


def _blank_tensors(stored: AdapterFile, modules: Mapping[str, Any], config: LoraConfig) -> dict[str, dict[str, Tensor]]:
    """Return tensors for the low-rank adapters that the config asks for, without their numbers."""
    blank: dict[str, dict[str, Tensor]] = {}
    for path, tensors in stored.tensors.items():
        if "lora_A" not in tensors or build.wrapper_class(modules.get(path)) is None:
            continue
        shape_A, shape_B = build.factor_shapes(modules[path], config.rank(path))
        is_trained = "bias" in tensors or config.bias != "none"
        has_bias = is_trained and modules[path]._parameters.get("bias") is not None
        asked = {"magnitude": config.use_dora, "lora_bias": config.lora_bias, "bias": has_bias}
        shapes = {"lora_A": shape_A, "lora_B": shape_B, **{key: shape_B[:1] for key in asked if asked[key]}}
        blank[path] = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return blank


def _copy_stored(
    stored: AdapterFile, layers: Mapping[str, AdapterWrapper], modules: Mapping[str, Any], config: LoraConfig, name: str
) -> None:
    """Copy the tensors of a file into the layers, without copies of the base's weights, which are compared."""
    own = {layout.parse_tensor_name(key): tensor for key, tensor in adapter_tensors(layers, name).items()}
    held = {(where, key): tensor for where, tensors in stored.tensors.items() for key, tensor in tensors.items()}
    misfits = []
    for where, key in list(held):
        if where and where not in layers and build.wrapper_class(modules.get(where)) is None:
            misfits.append(f"{where}: the model has no such layer")
        elif where and key == "weight" and not _is_weight_of(modules[where], held.pop((where, key))):
            misfits.append(f"{where}.base_layer.weight is not the weight of this model")
    for where, key in held.keys() & own.keys():
        theirs, needed = (tuple(tensors[where, key].shape) for tensors in (held, own))
        if theirs != needed:
            misfits.append(f"{where}.{key}: the adapter has {theirs}, the model needs {needed}".lstrip("."))
    if misfits:
        base = stored.values.get("base_model_name_or_path")
        of_base = f"; it was trained on {base!r:.200}" if base else ""
        raise TargetError(f"{stored.path} does not fit the model{of_base}:{listed(sorted({*misfits}), most=2)}")
    missing, unexpected = (
        ", ".join(sorted(f"{where}.{key}".lstrip(".") for where, key in keys)[:5])
        for keys in (own.keys() - held.keys(), held.keys() - own.keys())
    )
    if missing or unexpected:
        asked = {field: getattr(config, field) for field in TENSOR_FIELDS}
        problems = [missing and f"lacks {missing}", unexpected and f"also has {unexpected}"]
        problem = f"{WEIGHTS_FILE} {' and '.join(filter(None, problems))}"
        raise FormatError(f"{stored.path / CONFIG_FILE}: asks for {asked!r:.400}, but {problem}")
    copy_tensors_(own, held)


def _restarted(
    layers: Mapping[str, AdapterWrapper], init: str, config: LoraConfig, name: str
) -> dict[str, AdapterWrapper]:
    """Rebuild the linear layers with the start that PEFT subtracted, which is computed from their weights."""
    restarted = {}
    for path, layer in layers.items():
        if isinstance(layer, build.LINEAR_WRAPPERS):  # PEFT takes the word for True on other layers
            if isinstance(layer.base, NF4Linear):
                raise TargetError(f"{path}: {init} starts from the dense weight, and this one is 4-bit")
            start = factors_from_weight(init, build.matrix_of(layer.base), config.rank(path), config.scale(path))
            tensors = layer.adapters[name].tensors() | dict(zip(("start_A", "start_B"), start, strict=True))
            restarted[path] = build.low_rank_layer(layer.base, path, config, name, tensors)
    return restarted


def _is_weight_of(module: Any, copy: Tensor) -> bool:
    """Return whether a file's copy of a base weight is the module's; on "meta", as in a dry run, only by its shape."""
    weight = module.weight
    is_equal = copy.shape == weight.shape
    return is_equal and (weight.is_meta or torch.equal(copy.to(weight.device, weight.dtype), weight))


def _fields(config: LoraConfig, name: str, layers: Mapping[str, AdapterWrapper], modules: list[str]) -> dict[str, Any]:
    """Return what the JSON says of an adapter. A start doubles r, and α with it so that s stays."""
    values = {field: getattr(config, field) for field in layout.READ_FIELDS}
    low_rank = {where: layer for where, layer in layers.items() if isinstance(layer, LowRankWrapper)}
    adapters = {where: layer.adapters[name] for where, layer in low_rank.items()}
    times = 2 if any(isinstance(adapter, InitSubtractedAdapter) for adapter in adapters.values()) else 1
    growth = math.sqrt(times) if config.use_rslora else times
    ranks = {where: len(adapter.lora_A) for where, adapter in adapters.items()}
    alphas = {where: _alpha(config, where, adapter) for where, adapter in adapters.items()}
    saved = {where: layer.adapters[name] for where, layer in layers.items() if isinstance(layer, ModulesToSave)}
    whole = [where for where, copy in saved.items() if copy.own != {"bias"}]
    return {
        **{field: None if value == () else value for field, value in values.items()},
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "target_modules": shortest_names(list(low_rank), modules),
        "r": times * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": {f"^{where}": r for where, r in ranks.items() if r != times * config.r},
        "alpha_pattern": {f"^{where}": alpha for where, alpha in alphas.items() if alpha != growth * config.lora_alpha},
        "fan_in_fan_out": any(isinstance(layer, LoraConv1D) for layer in low_rank.values()),
        "modules_to_save": shortest_names(whole, modules, as_text=True) or None,  # as PEFT compares them
    }


def _alpha(config: LoraConfig, where: str, adapter: LoraAdapter) -> float:
    """Return the α that gives, with the adapter's rank, the scale that it has now, which a user may have set."""
    growth = len(adapter.lora_A) / config.rank(where)
    factor = adapter.scale / config.scale(where) * (math.sqrt(growth) if config.use_rslora else growth)
    return config.alpha(where) if factor == 1 else factor * config.alpha(where)


def _saved(stored: AdapterFile, entries: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the modules that a file holds in full; PEFT matches the ends of their paths as text.

    An entry that matches nothing is kept, so that it is reported as missing.
    """
    own, paths = stored.tensors.get("", {}), []
    if stored.values.get("ensure_weight_tying"):  # by which PEFT adds modules that the JSON does not name
        entries = (*entries, *(name.removesuffix(".weight") for name in own if name.endswith(".weight")))
    for name in own:
        prefixes = itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")
        paths += [path for path in prefixes if path.endswith(tuple(entries))][:1]
    return (*dict.fromkeys(paths), *(entry for entry in entries if not any(path.endswith(entry) for path in paths)))
