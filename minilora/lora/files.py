"""Adapters on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.<path>.lora_A.weight   (r, in)
    base_model.model.<path>.lora_B.weight   (out, r)

What an adapter adapts, and with which rank, is read from the tensors' names and shapes; the JSON adds the scale. A
pattern from a file is used only where its keys are names or the ends of names: as regular expressions those are
harmless. Ranks need no pattern; another `alpha_pattern` is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, FormatError, TargetError
from minilora.hub import fetch, unpinned, with_revision
from minilora.lora.attach import adapter_layers, base_held, linear_layers, place
from minilora.lora.config import LoraConfig
from minilora.quant.config import shortest_names
from minilora.quant.linear import Linear, dense_weight
from minilora.quant.nf4 import BLOCK_SIZES, CODEBOOKS
from minilora.storage import TensorFile, read_json, write_json, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_quantization"  # in the metadata of the weights' file
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BASE_COPY = re.escape(PREFIX) + r"(.+)\.base_layer\.weight"
PEFT_VERSION = "0.21.2"  # whose layout this is

# What PEFT 0.21.2 writes for a plain LoRA. A key that is not read below may only have this value, or an empty one.
PEFT_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
READ = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
INFORMATION = {  # true of how the adapter was made; without effect on what it computes
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "peft_version", "revision", "target_modules", "task_type"),
}
T = TypeVar("T")
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weights alone


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT, vLLM and `load_adapter` read.

    `base_model_name_or_path` is the model's `name_or_path`, where it has one, and `revision` the commit of a model from
    the hub. How the base's weights are held, dense or quantized, is written into the metadata of the tensors' file.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    layers = {where: layer for where, layer in adapter_layers(model).items() if name in layer.configs}
    if not layers:
        raise TargetError(f"the model has no adapter {name!r} to save")
    config = next(iter(layers.values())).configs[name]
    tensors = {}
    for where, layer in layers.items():
        tensors[f"{PREFIX}{where}.lora_A.weight"] = layer.lora_A[name]
        tensors[f"{PREFIX}{where}.lora_B.weight"] = layer.lora_B[name]
    base, revision = unpinned(getattr(model, "name_or_path", None) or "")
    fields = {
        "base_model_name_or_path": base or None,
        "revision": revision,
        "target_modules": shortest_names(list(layers), list(linear_layers(model))),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "rank_pattern": _named(config.rank_pattern, {where: config.rank(where) for where in layers}, config.r),
        "alpha_pattern": _named(
            config.alpha_pattern, {where: config.alpha(where) for where in layers}, config.lora_alpha
        ),
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
    }
    write_tensors(Path(path) / WEIGHTS_FILE, tensors, {BASE: json.dumps(base_held(model))})
    # Sorted like PEFT's, but the patterns keep their order: the first key that matches counts.
    write_json(Path(path) / CONFIG_FILE, dict(sorted({**PEFT_DEFAULTS, **fields}.items())))


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False) -> None:
    """Read an adapter that PEFT or `save_adapter` wrote, attach it to the model and activate it.

    `path` is its directory, or a repository of the hub, "org/name" or "org/name@revision".
    Everything else is frozen, other adapters too; with `trainable` the loaded one is what trains.

    Raises:
        FormatError: the adapter or a file of it is missing or malformed, or the config asks for something that is not
            a plain LoRA.
        TargetError: the adapter adapts modules that the model does not have, or has in other shapes; all of them are
            named, with both shapes.
    """
    path = fetch(path, "adapter")
    values = read_json(path / CONFIG_FILE)
    check_keys(path / CONFIG_FILE, values)
    factors = read_factors(path)
    ranks = {where: lora_A.size(0) for where, (lora_A, _) in factors.items()}
    config = config_from(path / CONFIG_FILE, values, ranks)
    linears = linear_layers(model)
    _check_fit(path, factors, linears)
    _check_copies(path / WEIGHTS_FILE, linears)
    place(model, config, name, factors, trainable)


def base_model_of(path: str | Path) -> str | None:
    """The model that an adapter was made for, as `load_model` takes it, with its revision; None if none is named.

    Raises:
        FormatError: there is no such adapter, or its config is not JSON.
    """
    values = read_json(fetch(path, "adapter") / CONFIG_FILE)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    return with_revision(base, revision) if isinstance(base, str) and base else None


def base_quantization(path: str | Path) -> dict[str, Any] | None:
    """How the weights of its base were held when an adapter was saved, as `quant.config.describe` tells it.

    None if the file does not say, as those of PEFT do not.

    Raises:
        FormatError: there is no such adapter, or what it says is not understood.
    """
    file = TensorFile(fetch(path, "adapter") / WEIGHTS_FILE)
    if BASE not in file.metadata:
        return None
    try:
        held = json.loads(file.metadata[BASE])
        if held == {"quantize": "none"}:
            return held
        found = {key: held[key] for key in ("quantize", "double_quant", "block_size", "quantize_skip")}
        is_known = found["quantize"] in CODEBOOKS and found["block_size"] in BLOCK_SIZES
        is_typed = isinstance(found["double_quant"], bool) and isinstance(found["quantize_skip"], list)
        if is_known and is_typed and all(map(is_name, found["quantize_skip"])):
            return found | ({"head": held["head"]} if held.get("head") in CODEBOOKS else {})
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise FormatError(f"{file.path}: metadata {BASE}: found {file.metadata[BASE]!r:.80}, need how a base is quantized")


def config_from(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig:
    """The checked values of a file as a `LoraConfig` for an adapter whose tensors have these ranks (path -> r)."""
    init, rank_pattern = values.get("init_lora_weights", True), values.get("rank_pattern") or {}
    try:
        config = LoraConfig(
            r=values.get("r", 8),
            lora_alpha=values.get("lora_alpha", 8),
            lora_dropout=values.get("lora_dropout", 0.0),
            target_modules=tuple(ranks),
            rank_pattern=rank_pattern if all(map(is_name, rank_pattern)) else {},
            alpha_pattern=values.get("alpha_pattern") or {},
            use_rslora=values.get("use_rslora", False),
            init_lora_weights=init if init in (True, "gaussian") else True,
        )
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error
    if any(config.rank(where) != r for where, r in ranks.items()):  # the tensors are right
        config = replace(config, rank_pattern={f"^{where}": r for where, r in ranks.items() if r != config.r})
    return config


def check_keys(path: Path, values: Mapping[str, Any]) -> None:
    """What is not understood may be there only if it says nothing."""
    bad = []
    for key, value in values.items():
        if key in READ or key in INFORMATION or not value or PEFT_DEFAULTS.get(key) == value:
            continue
        bad.append(f"{key}: found {value!r}; accepted is {PEFT_DEFAULTS.get(key)!r}, or the key left out")
    if values.get("init_lora_weights", True) not in PLAIN_INITS:
        bad.append(f"init_lora_weights: found {values['init_lora_weights']!r}, which changes the base's weights")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(key) or {}, dict):
            bad.append(f"{key}: found {values[key]!r}, need an object")
        elif key == "alpha_pattern":
            names = values.get(key) or {}
            bad += [f"{key}: {name!r} is not a module name or the end of one" for name in names if not is_name(name)]
    if bad:
        raise FormatError(f"{path}: not a plain LoRA that can be read:\n  " + "\n  ".join(bad))


def is_name(key: str) -> bool:
    """A path or the end of one, `^` in front meaning "from the start": harmless as a regular expression."""
    return re.fullmatch(r"\^?[\w.-]+", key) is not None


def _named(pattern: Mapping[str, T], values: Mapping[str, T], default: T) -> dict[str, T]:
    """A pattern whose keys are names, which is all that `load_adapter` accepts: spelled out if need be."""
    if all(is_name(key) for key in pattern):
        return dict(pattern)
    return {f"^{where}": value for where, value in values.items() if value != default}


def read_factors(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of the module -> its A and B, in float32 at least.

    Raises:
        FormatError: a tensor is not the A or B of a linear, or one of a pair is missing.
    """
    path = directory / WEIGHTS_FILE
    file = TensorFile(path)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name in file.shapes:
        # The adapter's own name may stand before "weight": PEFT accepts it, older files have it.
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight", name)
        if re.fullmatch(BASE_COPY, name):
            continue
        if found is None or len(file.shapes[name]) != 2:
            unknown.append(name)
        elif found[2] in parts.get(found[1], {}):
            raise FormatError(f"{path}: {found[1]} has more than one {found[2]}")
        else:
            tensor = file.read(name)
            if tensor.dtype not in DTYPES or not tensor.isfinite().all():
                raise FormatError(f"{path}: {name} is {tensor.dtype} or not finite; need finite {DTYPES}")
            wide = torch.promote_types(tensor.dtype, torch.float32)
            parts.setdefault(found[1], {})[found[2]] = tensor.to(wide, copy=True)
    if unknown:
        raise FormatError(f"{path}: {unknown[:5]} are not the A or B of a linear ({PREFIX}<module>.lora_A.weight)")
    if lacking := [where for where, pair in parts.items() if len(pair) != 2]:
        raise FormatError(f"{path}: {lacking[:5]} have only one of lora_A and lora_B")
    return {where: (pair["lora_A"], pair["lora_B"]) for where, pair in parts.items()}


def _check_fit(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]], linears: Mapping[str, Linear]) -> None:
    problems = []
    for where, (lora_A, lora_B) in factors.items():
        if where not in linears:
            problems.append(f"{where}: the model has no such linear")
            continue
        base = linears[where]
        expected = (base.out_features, base.in_features)
        found = (lora_B.size(0), lora_A.size(1))
        if found != expected or lora_A.size(0) != lora_B.size(1):
            shapes = f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
            problems.append(f"{where}: the adapter has {shapes}, the model's weight is {expected}")
    if problems:
        more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise TargetError(f"{path} does not fit the model:\n  " + "\n  ".join(problems[:10]) + more)


def _check_copies(path: Path, linears: Mapping[str, Linear]) -> None:
    """PEFT adds a copy of the base's weight where the head is adapted: it must be the weight that the model has."""
    file = TensorFile(path)
    for name in file.shapes:
        if copied := re.fullmatch(BASE_COPY, name):
            base = dense_weight(linears[copied[1]]) if copied[1] in linears else None
            if base is None or not torch.equal(file.read(name).to(base.device, base.dtype), base):
                raise TargetError(f"{path}: {name} is not the weight of this model; the adapter was made for another")
