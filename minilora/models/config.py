"""Read the `config.json` of every family of models; a missing key has the value that transformers gives it.

A wrapper, such as a model that also sees images, has a text model. Its config.json has the text model's own under
`text_config`, and its tensors the text model's under a longer name:

    model.language_model.layers.0.mlp.up_proj.weight   or   language_model.model.layers.0.mlp.up_proj.weight
    ->               model.layers.0.mlp.up_proj.weight

Other tensors (vision, multi-token prediction `mtp.`) are not read.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError, in_recipe
from minilora.files import TensorFile, read_json, tensor_files
from minilora.llama import REQUIRED, LlamaConfig
from minilora.models.bitsandbytes import is_four_bit
from minilora.models.delta_rule import SIZES as LINEAR_SIZES
from minilora.models.family import Family, equal_windows
from minilora.models.gemma3 import GEMMA3
from minilora.models.ministral3 import MINISTRAL3
from minilora.models.olmo2 import OLMO2, OLMO3
from minilora.models.qwen3 import QWEN2, QWEN3
from minilora.models.qwen35 import QWEN35
from minilora.models.rotary import build_rope
from minilora.models.smollm3 import SMOLLM3
from minilora.options import FLOAT, is_positive

Need = tuple[Callable[[Any], bool], str]  # whether a value is right, and the message if it is not


def whole_number(most: int, least: int = 1) -> Need:
    return lambda value: type(value) is int and least <= value <= most, f"need a whole number from {least} to {most}"


def number(most: float = FLOAT) -> Need:
    return lambda value: is_positive(value) and value <= most, f"need a number above 0, at most {most:g}"


def of_type(kind: type, words: str) -> Need:
    return lambda value: isinstance(value, kind), f"need {words}"


SIZE = whole_number(2**19)  # no product of them overflows
LENGTH = whole_number(2**31 - 1)
FLAG = of_type(bool, "true or false")
NEEDS: dict[str, Need] = {  # of a value that is not null
    "vocab_size": whole_number(2**21),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), SIZE),
    **dict.fromkeys(("full_attention_interval", *LINEAR_SIZES), SIZE),
    "num_hidden_layers": whole_number(160),  # Llama 3.1 405B has 126
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), LENGTH),
    **dict.fromkeys(("sliding_window_pattern", "no_rope_layer_interval"), LENGTH),
    "max_window_layers": whole_number(2**31 - 1, least=0),  # 0: every layer has a window
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_local_base_freq"), number()),
    "query_pre_attn_scalar": number(),
    "partial_rotary_factor": number(1.0),
    "rope_scaling": of_type(Mapping, "a JSON object"),
    **dict.fromkeys(("layer_types", "no_rope_layers"), of_type(list, "a JSON list")),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"), FLAG),
}
UNKNOWN = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")

LLAMA = Family("Llama", {"max_position_embeddings": 2048}, biases=("attention_bias", "mlp_bias"))
MISTRAL = Family(
    "Mistral", {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}, equal_windows
)
FAMILIES: dict[str, Family] = {  # by model_type
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_5_text": QWEN35,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "gemma3_text": GEMMA3,
}
COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
COPIED = (*REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta")
TEXT_SIZES = {  # the defaults of `REQUIRED` in transformers; of a part's config, version 4 wrote only what differs
    "gemma3_text": (262_208, 2304, 9216, 26, 8),
    "llama": (32_000, 4096, 11_008, 32, 32),
    "mistral": (32_000, 4096, 14_336, 32, 32),
    "qwen2": (151_936, 4096, 22_016, 32, 32),
}
SHARED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")  # set by the wrapper for all its parts
TEXT = re.compile(r"model\.language_model\.(?P<rest>.+)|language_model\.(?P<model>(?:model|lm_head)\..+)|lm_head\..+")


def parse_config(source: Mapping[str, Any]) -> LlamaConfig:
    """Read a `config.json` of transformers 4 or 5; of a wrapper, its text model's part."""
    source = text_config(source)
    name = source.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"model_type {name!r:.80} is not supported; supported are {sorted(FAMILIES)}")
    architectures = source.get("architectures")
    if "Classification" in str(architectures):
        raise ConfigError(f"architectures {architectures!r:.80}: is a classifier; {in_recipe('classify_texts')}")
    family = FAMILIES[name]
    values = COMMON | dict(family.defaults)
    values |= {k: v for k, v in _flat(source).items() if v is not None or k not in COMMON}
    _check_values(values, family)
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
    if heads % values["num_key_value_heads"]:
        groups = values["num_key_value_heads"]
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    own = {"source": dict(source), **family.fields(values)}
    if "rope" not in own and (values["rope_scaling"] or values["head_dim"] % 2 or values["partial_rotary_factor"] != 1):
        own["rope"] = build_rope(values, values["head_dim"])
    return replace(LlamaConfig.from_dict({key: values.get(key) for key in (*COPIED, *family.biases)}), **own)


def trained_length(config: LlamaConfig) -> int:
    """Return the length of the documents that a model was trained on."""
    family = FAMILIES[config.source["model_type"]]
    length: int = config.source.get("max_position_embeddings") or family.defaults["max_position_embeddings"]
    return length


def read_config(directory: Path) -> LlamaConfig:
    """Read the config.json of a model directory; an error of `parse_config` names it."""
    path = directory / "config.json"
    try:
        return parse_config(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def text_config(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the text model in a wrapper's, or the config itself."""
    text = source.get("text_config")
    if not isinstance(text, Mapping):
        return source
    sizes = dict(zip(REQUIRED, TEXT_SIZES.get(str(text.get("model_type")), ()), strict=False))
    missing = {key: size for key, size in sizes.items() if text.get(key) is None}
    return {**text, **missing, **{key: source[key] for key in SHARED if source.get(key) is not None}}


def text_name(name: str) -> str | None:
    """Return the name of a wrapper's tensor in the text model, or None for a tensor of another part.

    >>> text_name("model.language_model.norm.weight"), text_name("language_model.lm_head.weight"), text_name("mtp.fc")
    ('model.norm.weight', 'lm_head.weight', None)
    """
    match = TEXT.fullmatch(name)
    if match is None:
        return None
    return f"model.{match['rest']}" if match["rest"] else match["model"] or name


def text_path(path: str) -> str:
    """Return the path in the text model that a path in an adapter means, whatever wrapped the model in training.

    >>> text_path("_orig_mod.model.language_model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    """
    path = path.replace("_orig_mod.", "").removesuffix(".base_layer")
    return (text_name(f"{path}.weight") or f"{path}.weight").removesuffix(".weight")


def is_wrapper(directory: Path) -> bool:
    """Return whether a model directory has a text model in a wrapper."""
    return isinstance(read_json(directory / "config.json").get("text_config"), Mapping)


def text_files(directory: Path, is_mapped_once: bool = False) -> dict[str, TensorFile]:
    """Return the files of a directory by the names of tensors in the text model; see `tensor_files`."""
    return tensor_files(directory, is_mapped_once, text_name if is_wrapper(directory) else None)


def describe_other_parts(directory: Path) -> str:
    """Return which tensors of a wrapper are not read, as "model.visual (153 tensors), mtp (9 tensors)", or ""."""
    if not is_wrapper(directory):
        return ""
    others = [name for name in tensor_files(directory) if text_name(name) is None]
    parts = Counter(".".join(name.split(".")[: 1 + name.startswith("model.")]) for name in others)
    return ", ".join(f"{part} ({count:,} tensors)" for part, count in sorted(parts.items()))


def _flat(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in the form of transformers 4: `rope_parameters` become `rope_scaling` and `rope_theta`."""
    scaling = source.get("rope_scaling") or source.get("rope_parameters") or {}
    given = {}
    if isinstance(scaling, Mapping):
        given = {key: scaling[key] for key in ("rope_theta", "partial_rotary_factor") if scaling.get(key)}
    return {**source, "rope_scaling": scaling, **given}


def _check_values(values: Mapping[str, Any], family: Family) -> None:
    """Raise a `ConfigError` that names every key with an impossible value."""
    bad = {}
    for key, (is_right, need) in NEEDS.items():
        value = values.get(key)
        if (value is not None or key in REQUIRED) and not is_right(value):
            bad[key] = f"found {value!r:.80}, {need}"
    bad |= {key: f"found {values[key]!r:.80}, which none of the families has" for key in UNKNOWN if values.get(key)}
    act = family.defaults.get("hidden_act", "silu")
    key = "hidden_activation" if values.get("hidden_activation") else "hidden_act"  # the first is Gemma's
    if values[key] not in (act, "swish" if act == "silu" else act):
        bad[key] = f"found {values[key]!r:.80}, supported is {act!r}"
    if values.get("quantization_config") is not None and not is_four_bit(values):
        entry = values["quantization_config"]
        method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
        bad["quantization_config"] = (
            f"found {method!r:.80}, and only bitsandbytes' 4-bit weights can be read; give the 16-bit model, with "
            "--quantize nf4 to save memory"
        )
    if bad:
        raise ConfigError("config.json cannot be used:" + "".join(f"\n  {key}: {bad[key]}" for key in bad))
