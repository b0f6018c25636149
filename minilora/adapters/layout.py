"""PEFT's layout of an adapter's directory, and reading it without a model.

    base_model.model.<path>.lora_A.weight   (r, in)       lora_B.weight (out, r)    lora_B.bias (out)
                            lora_embedding_A  (r, num)    lora_embedding_B (dim, r)
                            lora_magnitude_vector (out)   base_layer.bias (out)
                            token_adapter.trainable_tokens_delta (n, dim)
    base_model.model.<name of a parameter of the model>   of a module that was trained in full, or a bias

Which modules are adapted, and with which rank, is read from the names and shapes of the tensors; the JSON adds the
scale. A pattern from a file is used only if its keys are names or ends of names, which are harmless as regular
expressions. Another `rank_pattern` is not needed and ignored; another `alpha_pattern` is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.adapter import PREFIX
from minilora.adapters.config import LoraConfig
from minilora.errors import ConfigError, FormatError, in_recipe, listed
from minilora.files import MANIFEST, TensorFile, parse_object, read_json, verify
from minilora.models.bitsandbytes import CODEBOOKS
from minilora.models.config import text_path
from minilora.models.hub import HUB_ID
from minilora.models.prompts import read_prompt_files
from minilora.models.tokenizer import Tokenizer, find_tokenizer
from minilora.options import fits

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_NAMES = 10_000  # of modules, in one key of a config: each is compared with each module
# A path or the end of one, which is safe as a regular expression. PEFT writes `.*\.` before names of Mixtral's experts.
NAME = re.compile(r"(\^|\.\*\\\.)?[\w.-]+")

ADAPTER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BASE_METADATA = "base_quantization"  # in the metadata of the weights' file, with these fields
BASE_FIELDS = {"quantize": str, "double_quant": bool, "block_size": int}

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
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
}
IGNORED_FIELDS = {  # how the adapter was made; without effect on what it computes
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "peft_version", "revision", "target_modules", "fan_in_fan_out", "eva_config"),
    "ensure_weight_tying",
}
READ_FIELDS = {field.name for field in fields(LoraConfig)} - IGNORED_FIELDS
PEFT_FALLBACKS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # where the file does not say
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weights alone
DETERMINISTIC_INITS = ("pissa", "olora")  # those whose part of the weights can be computed again

DUPLICATE_BIAS = re.compile(r"(.+\.)(?:original_module|modules_to_save)\.((?:.+\.)?bias)")  # of a module saved in full
TENSOR_ENDINGS = {  # key in `low_rank_layer` -> end of the tensor's name; older files have the adapter's in it
    "lora_A": r"lora_A(?:\.[^.]+)?\.weight|lora_embedding_A(?:\.[^.]+)?",
    "lora_B": r"lora_B(?:\.[^.]+)?\.weight|lora_embedding_B(?:\.[^.]+)?",
    "lora_bias": r"lora_B(?:\.[^.]+)?\.bias",
    "magnitude": r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    "weight": r"base_layer\.weight",
    "bias": r"base_layer\.bias",
    "rows": r"token_adapter\.trainable_tokens_delta(?:\.[^.]+)?",
}
_ANY_ENDING = "|".join(f"(?P<{key}>{end})" for key, end in TENSOR_ENDINGS.items())
TENSOR_NAME = re.compile(rf"(?P<path>.+)\.(?:{_ANY_ENDING})")


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter's directory."""

    path: Path
    values: dict[str, Any]  # of the JSON, checked
    tensors: dict[str, dict[str, Tensor]]  # path of a module -> key of `parse_tensor_name` -> tensor, float32 at least

    def config(self) -> LoraConfig:
        """Return the config of the adapter, with the ranks that its A have."""
        ranks = {where: held["lora_A"].size(0) for where, held in self.tensors.items() if "lora_A" in held}
        values = self.values
        init = values.get("init_lora_weights", True)
        given = {key: values[key] for key in READ_FIELDS & values.keys() if values[key] or key in PEFT_FALLBACKS}
        given |= {"init_lora_weights": init if init in (True, "gaussian") else True, "target_modules": tuple(ranks)}
        given = {**PEFT_FALLBACKS, "task_type": None, **given}
        given["rank_pattern"] = {f"^{where}": r for where, r in ranks.items() if r != given["r"]}
        try:
            return LoraConfig(**given)
        except (ConfigError, TypeError) as error:
            raise FormatError(f"{self.path / CONFIG_FILE}: {error}") from error


def read_adapter(directory: Path, is_for_text: bool = False) -> AdapterFile:
    """Read an adapter's two files, with the names of the text model if `is_for_text` says so (see `text_path`)."""
    values = read_values(directory)
    if (directory / MANIFEST).is_file():
        verify(directory, [WEIGHTS_FILE])
    file = TensorFile(directory / WEIGHTS_FILE)
    tensors: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}  # path in the text model -> path in the file
    if strange := [name for name in file.shapes if not name.startswith(PREFIX)]:
        raise FormatError(f"{file.path}: {strange[:5]} are not an adapter's: names have to begin with {PREFIX}")
    for name in file.shapes:
        if (repeated := DUPLICATE_BIAS.fullmatch(name)) and "".join(repeated.groups()) in file.shapes:
            continue
        where, key = parse_tensor_name(name)
        if is_for_text:
            names[text_path(where or key)] = where or key
            where, key = text_path(where), key if where else text_path(key)
        if key in tensors.setdefault(where, {}):
            raise FormatError(f"{file.path}: {where} has more than one {key}")
        tensor = file.read(name)
        if tensor.dtype not in ADAPTER_DTYPES or not tensor.isfinite().all():
            found = f"is {tensor.dtype}, or has numbers that are not finite"
            raise FormatError(f"{file.path}: {name} {found}; need finite numbers of {ADAPTER_DTYPES}")
        if key in ("lora_A", "lora_B") and (tensor.dim() != 2 or 0 in tensor.shape):
            more = f"; if it is of a convolution, {in_recipe('convolutions')}" if tensor.dim() > 2 else ""
            raise FormatError(f"{file.path}: {name} is {tuple(tensor.shape)}, need a matrix that is not empty{more}")
        tensors[where][key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    if not tensors:
        raise FormatError(f"{file.path}: has no tensors, so it is not an adapter")
    if any(where != path for where, path in names.items()):
        _rename_settings_(values, AdapterFile(directory, values, {}).config(), names)
    for where, held in tensors.items():
        if ("lora_A" in held) != ("lora_B" in held) or (where and not held.keys() & {"lora_A", "rows"}):
            raise FormatError(f"{file.path}: {where} has {sorted(held)}, need lora_A and lora_B, or trained rows")
        if "lora_A" in held and len(held["lora_A"]) != held["lora_B"].size(1):
            shapes = [tuple(held[key].shape) for key in ("lora_A", "lora_B")]
            raise FormatError(f"{file.path}: {where} has lora_A and lora_B of two ranks: {shapes}")
    return AdapterFile(directory, values, tensors)


def _rename_settings_(values: dict[str, Any], config: LoraConfig, names: Mapping[str, str]) -> None:
    """Give settings the names of modules in the text model; see `read_adapter`."""
    alphas = {f"^{where}": config.alpha(path) for where, path in names.items()}
    values["alpha_pattern"] = {where: alpha for where, alpha in alphas.items() if alpha != config.lora_alpha}
    values["modules_to_save"] = [text_path(name) for name in config.modules_to_save]
    if isinstance(tokens := config.trainable_token_indices, Mapping):
        values["trainable_token_indices"] = {text_path(name): ids for name, ids in tokens.items()}


def base_model_of(directory: Path) -> str | None:
    """Return the model that an adapter was made for, as `load_model` takes it, with its revision; None if unknown."""
    values = read_json(directory / CONFIG_FILE)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base:
        return None
    return f"{base}@{revision}" if revision and HUB_ID.fullmatch(base) else base  # a path has none


def tokenizer_of(model: str, adapters: Sequence[Path]) -> Tokenizer | None:
    """Return the tokenizer of a model, or of the first adapter that trained tokens and has one; None if there is none.

    It is asked as the adapters say, if they do.
    """
    trained_tokens = (path for path in adapters if read_values(path).get("trainable_token_indices"))
    own = (path for path in trained_tokens if (path / "tokenizer.json").is_file())
    tokenizer = find_tokenizer(next(own, model))
    texts = read_prompt_files(*adapters)
    origin = ", ".join(map(str, adapters))
    return tokenizer.with_files(texts, origin=origin) if tokenizer and texts else tokenizer


def base_quantization(directory: Path) -> dict[str, Any] | None:
    """Return `describe_quantization` of the model that an adapter was saved from; None if the file does not say."""
    file = TensorFile(directory / WEIGHTS_FILE)
    if BASE_METADATA not in file.metadata:
        return None
    where = f"{file.path}: metadata {BASE_METADATA}"
    values = parse_object(file.metadata[BASE_METADATA], where)
    known = {key: values[key] for key in BASE_FIELDS if key in values}
    is_typed = all(fits(value, BASE_FIELDS[key]) for key, value in known.items())
    if not is_typed or known.get("quantize") not in ("none", *CODEBOOKS):
        raise FormatError(f"{where}: found {values!r:.80}, need an object that says how the base is quantized")
    return known


def parse_tensor_name(name: str) -> tuple[str, str]:
    """Return the path of the module that a tensor of a file belongs to, and the tensor's key in `low_rank_layer`.

    "weight" is a copy of the base's weight. A parameter of the model itself has the path "" and its full name.
    """
    name = name.removeprefix(PREFIX)
    match = TENSOR_NAME.fullmatch(name)
    return (match["path"], str(match.lastgroup)) if match else ("", name)


def read_values(directory: Path) -> dict[str, Any]:
    """Read the JSON; raise a FormatError that names all unsupported keys whose value is neither PEFT's nor empty."""
    values = read_json(directory / CONFIG_FILE)
    check_values(values, directory / CONFIG_FILE)
    return values


def unknown_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that are not supported, and neither PEFT's defaults nor empty."""
    known = READ_FIELDS | IGNORED_FIELDS
    return {key: v for key, v in values.items() if key not in known and v and v != PEFT_DEFAULTS.get(key)}


def check_values(values: Mapping[str, Any], path: Path) -> None:
    """Raise the FormatError of `read_values`."""
    unknown = unknown_settings(values)
    if parameters := unknown.get("target_parameters"):
        raise FormatError(f"{path}: target_parameters: found {parameters!r:.80}; {in_recipe('experts')}")
    bad = [f"{k}: found {v!r}; accepted is {PEFT_DEFAULTS.get(k)!r}, or the key left out" for k, v in unknown.items()]
    init = values.get("init_lora_weights", True)
    if init not in PLAIN_INITS and init not in DETERMINISTIC_INITS:
        bad.append(f"init_lora_weights: found {init!r}, which changes the base's weights and cannot be repeated")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        names, kind = values.get(key) or (), dict if key.endswith("pattern") else list
        if not isinstance(names, kind | tuple) or len(names) > MAX_NAMES:
            need = "an object with" if kind is dict else "a list of"
            bad.append(f"{key}: found {names!r:.80}, need {need} at most {MAX_NAMES:,} names")
        elif key != "rank_pattern":
            strange = [name for name in names if not (isinstance(name, str) and NAME.fullmatch(name))]
            bad += [f"{key}: {name!r:.80} is not a module name or the end of one" for name in strange]
    if bad:
        raise FormatError(f"{path}: not a LoRA that can be read:{listed(bad)}")
