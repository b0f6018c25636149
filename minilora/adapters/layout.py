"""PEFT's layout of an adapter, in words: the keys of `adapter_config.json`, and the names of tensors.

    base_model.model.<path>.lora_A.weight   (r, in)       lora_B.weight (out, r)    lora_B.bias (out)
                            lora_embedding_A  (r, num)    lora_embedding_B (dim, r)
                            lora_magnitude_vector (out)   base_layer.bias (out)
                            token_adapter.trainable_tokens_delta (n, dim)
    base_model.model.<name of a parameter of the model>   of a module that was trained in full, or a bias

What an adapter adapts, and with which rank, is read from the tensors' names and shapes; the JSON adds the scale. A
pattern from a file is used only where its keys are names or the ends of names: as regular expressions those are
harmless. Ranks need no pattern; another `alpha_pattern` is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from minilora.adapters.config import RANDOMIZED, LoraConfig
from minilora.errors import ConfigError, FormatError
from minilora.storage import TensorFile

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"  # whose layout this is

# What PEFT 0.21.2 writes for a plain LoRA. A key that is not read below may only have this value, or an empty one.
PEFT_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config")),
    **dict.fromkeys(("exclude_modules", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform")),
    **dict.fromkeys(("lora_ga_config", "megatron_config", "modules_to_save", "monteclora_config", "revision")),
    **dict.fromkeys(("target_parameters", "trainable_token_indices", "use_bdlora", "velora_config")),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), False),
    "bias": "none",
    "inference_mode": True,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
}
INFORMATION = {  # true of how the adapter was made; without effect on what it computes
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "peft_version", "revision", "target_modules", "fan_in_fan_out", "eva_config"),
}
READ = {field.name for field in fields(LoraConfig)} - INFORMATION
T = TypeVar("T")
ALWAYS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # PEFT's, where the file does not say
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weights alone
REPEATED = ("pissa", "olora")  # those whose part of the weights can be found again
REPEATED_BIAS = re.compile(r"(.+\.)(?:original_module|modules_to_save)\.((?:.+\.)?bias)")  # of a module saved whole
KEY = re.compile(  # the last group is there for the adapter's own name, which older files have
    r"(?P<path>.+)\.(?:"
    r"(?P<factor>lora_[AB])(?:\.[^.]+)?\.(?P<what>weight|bias)|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?|base_layer\.(?P<base>weight|bias)|"
    r"token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.[^.]+)?)"
)


def parse_tensor_name(name: str) -> tuple[str, str]:
    """Return the path of the module that a tensor of a file belongs to, and the tensor's key in `build_adapter`.

    "weight" is a copy of the base's weight. A parameter of the model itself has the path "" and its full name.
    """
    name = name.removeprefix(PREFIX)
    found = KEY.fullmatch(name)
    if found is None or (found["factor"] == "lora_A" and found["what"] == "bias"):
        return "", name
    if found["factor"]:
        return found["path"], "lora_bias" if found["what"] == "bias" else found["factor"]
    if found["embedding"]:
        return found["path"], f"lora_{found['embedding']}"
    return found["path"], "magnitude" if found["magnitude"] else found["base"] or "rows"


def factor_name(where: str, factor: str, is_embedding: bool) -> str:
    """Return PEFT's name of A or B of a module; older files also have the adapter's name in it."""
    return f"{PREFIX}{where}." + (factor.replace("_", "_embedding_") if is_embedding else f"{factor}.weight")


def config_from(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig:
    """Return the `LoraConfig` of a file's checked values, for tensors of these ranks (path -> r)."""
    init, ranked = values.get("init_lora_weights", True), values.get("rank_pattern") or {}
    said = {key: values[key] for key in READ & values.keys() if values[key] or key in ALWAYS}
    said |= {"init_lora_weights": init if init in (True, "gaussian") else True, "target_modules": tuple(ranks)}
    said["rank_pattern"] = ranked if all(map(is_name, ranked)) else {}
    try:
        config = LoraConfig(**{**ALWAYS, "task_type": None, **said})
        if any(config.rank(where) != r for where, r in ranks.items()):  # the tensors are right
            config = replace(config, rank_pattern={f"^{where}": r for where, r in ranks.items() if r != config.r})
    except (ConfigError, TypeError) as error:
        raise FormatError(f"{path}: {error}") from error
    return config


def fields_of(config: LoraConfig) -> dict[str, Any]:
    """Return the fields to write for an adapter that leaves the base's weights as they are."""
    said = {name: getattr(config, name) for name in READ}
    init = "gaussian" if config.init_lora_weights == "gaussian" else True
    return {name: None if value == () else value for name, value in said.items()} | {"init_lora_weights": init}


def metadata_of(file: TensorFile, key: str, parse: Callable[[Any], T | None], need: str) -> T | None:
    """Return `parse` of a JSON value in a file's metadata; None if there is none.

    Raises:
        FormatError: `parse` fails or returns None.
    """
    if key not in file.metadata:
        return None
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if (found := parse(json.loads(file.metadata[key]))) is not None:
            return found
    raise FormatError(f"{file.path}: metadata {key}: found {file.metadata[key]!r:.80}, need {need}")


def check_keys(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse keys that are not supported, unless they have PEFT's default or an empty value.

    Raises:
        FormatError: there are others; all of them are named in one message.
    """
    bad = []
    for key, value in values.items():
        if key in READ or key in INFORMATION or not value or PEFT_DEFAULTS.get(key) == value:
            continue
        bad.append(f"{key}: found {value!r}; accepted is {PEFT_DEFAULTS.get(key)!r}, or the key left out")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and re.fullmatch(RANDOMIZED, init):
        bad.append(f"init_lora_weights: found {init!r}, a decomposition that was drawn and cannot be repeated")
    elif init not in PLAIN_INITS and init not in REPEATED:
        bad.append(f"init_lora_weights: found {init!r}, which changes the base's weights")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(key) or {}, dict):
            bad.append(f"{key}: found {values[key]!r}, need an object")
        elif key == "alpha_pattern":
            names = values.get(key) or {}
            bad += [f"{key}: {name!r} is not a module name or the end of one" for name in names if not is_name(name)]
    for key in ("modules_to_save", "target_parameters"):
        names = values.get(key) or []
        if not (isinstance(names, list) and all(isinstance(name, str) and is_name(name) for name in names)):
            bad.append(f"{key}: found {names!r}, need a list of names")
    if bad:
        raise FormatError(f"{path}: not a LoRA that can be read:\n  " + "\n  ".join(bad))


def is_name(key: str) -> bool:
    """Return whether a key is a path or the end of one, which is safe as a regular expression.

    `^` in front means "from the start"; PEFT itself writes `.*\\.` there, for the experts of Mixtral.
    """
    return re.fullmatch(r"(\^|\.\*\\\.)?[\w.-]+", key) is not None


def named(pattern: Mapping[str, T] | None, values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return a pattern whose keys are names, as `load_adapter` requires: the given one, or one key for each module."""
    if pattern is not None and all(is_name(key) for key in pattern):
        return dict(pattern)
    return {f"^{where}": value for where, value in values.items() if value != default}
