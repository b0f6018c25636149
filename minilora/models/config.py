"""Read the `config.json` of every family of models; a missing key has the value that transformers gives it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError, in_recipe
from minilora.files import read_json
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
from minilora.models.wrapper import text_config
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
