"""Read the `config.json` of a Llama-family checkpoint.

The families differ in biases, norms of q and k, fused projections, sliding windows and layers without rotation, so one
data class describes them all. A missing key has the value that transformers gives it.

Models also differ in how they rotate longer contexts. A pair i of a head turns by `position · frequency[i]`:

    default   θ^(-2i/R)                                      Su et al. 2021, RoFormer, eq. 15
    linear    θ^(-2i/R) / factor                             Chen et al. 2023, Position Interpolation
    dynamic   θ grows with documents beyond trained length   "NTK-aware" scaling, 2023
    llama3    long waves / factor, short ones kept, a ramp   Llama 3.1's reference code
    longrope  a factor a pair, for short or long documents   Ding et al. 2024, LongRoPE

`dynamic` and `longrope` depend on the length of the whole document (`ScaledRope.changes`).

    N  tokens of all spans    R  rotated width of a head
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora import llama
from minilora.errors import ConfigError, in_recipe
from minilora.llama import Rope
from minilora.models.bitsandbytes import is_four_bit
from minilora.storage import COUNT, FLOAT, SIZES, read_json

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL_ROPE_KEYS = {
    "llama3": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "factor", "attention_factor"),
}


@dataclass(frozen=True)
class ScaledRope(Rope):
    """A rotation whose frequencies may be scaled.

    Args:
        width, theta: as of `llama.Rope`.
        kind: a key of `ROPE_KEYS`.
        scaling: the numbers that the kind needs.
        trained_length: the length that scaling starts from.
        max_length: `max_position_embeddings` of the config.
    """

    kind: str
    scaling: Mapping[str, Any]
    trained_length: int
    max_length: int

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ROPE_KEYS:
            raise ConfigError(f"rope type {self.kind!r:.80} is not supported; supported are {sorted(ROPE_KEYS)}")
        if missing := [key for key in ROPE_KEYS[self.kind] if self.scaling.get(key) is None]:
            raise ConfigError(f"rope type {self.kind!r:.80} needs {missing}; the config has {sorted(self.scaling)}")
        bad, pairs = [], (self.width + 1) // 2
        for key in (*ROPE_KEYS[self.kind], *OPTIONAL_ROPE_KEYS.get(self.kind, ())):
            value = self.scaling.get(key)
            if key in ("short_factor", "long_factor"):
                if not (isinstance(value, list | tuple) and len(value) == pairs and all(map(is_positive, value))):
                    bad.append(f"{key}: found {value!r:.80}, need a list of {pairs} numbers, one a pair")
            elif value is not None and not is_positive(value):
                bad.append(f"{key}: found {value!r:.80}, need a number above 0")
        if self.kind == "longrope" and self.trained_length < 2:  # its logarithm divides
            bad.append(f"original_max_position_embeddings: found {self.trained_length!r}, need at least 2")
        low, high = (self.scaling.get(f"{end}_freq_factor") for end in ("low", "high"))
        if self.kind == "llama3" and not bad and not low < high:  # type: ignore[operator]  # both are numbers
            bad.append(f"low_freq_factor: found {low!r}, need less than high_freq_factor, {high!r}")
        if self.kind == "dynamic" and self.width <= 2:
            bad.append(f"only {self.width} coordinates of a head turn, and it needs more than 2")
        if bad:
            raise ConfigError(f"rope type {self.kind!r:.80}: " + "; ".join(bad))

    def rotation(self, spans: Sequence[range], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin of position · frequency, (N, R/2) each in float32, times the amplitude."""
        cos, sin = super().rotation(spans, device)
        return cos * self.amplitude, sin * self.amplitude

    def frequencies(self, length: int) -> Tensor:
        pairs, theta = torch.arange(0, self.width, 2).float() / self.width, self.theta
        if self.kind == "dynamic":
            factor, trained = self.scaling["factor"], self.max_length
            growth = factor * max(length, trained) / trained - (factor - 1)
            theta = self.theta * growth ** (self.width / (self.width - 2))
        if self.kind == "longrope":
            stretch = "long_factor" if length > self.trained_length else "short_factor"
            return 1.0 / (torch.tensor(self.scaling[stretch], dtype=torch.float32) * self.theta**pairs)
        plain = 1.0 / theta**pairs
        if self.kind == "linear":
            return plain / self.scaling["factor"]
        return self._llama3(plain) if self.kind == "llama3" else plain

    def changes(self, before: int, after: int) -> bool:
        """Return whether the angles of a document's tokens change if it grows from one length to another."""
        if self.kind == "dynamic":
            return after > max(before, self.max_length)
        return self.kind == "longrope" and before <= self.trained_length < after

    @property
    def amplitude(self) -> float:
        """The factor of cos and sin: 1, but for longrope √(1 + ln s / ln L) with the trained length L, as in Phi-3."""
        if self.kind != "longrope":
            return 1.0
        if (given := self.scaling.get("attention_factor")) is not None:
            return float(given)
        stretch = self.scaling.get("factor") or self.max_length / self.trained_length
        return 1.0 if stretch <= 1.0 else math.sqrt(1 + math.log(stretch) / math.log(self.trained_length))

    def _llama3(self, plain: Tensor) -> Tensor:
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        turns = self.trained_length * plain / (2 * math.pi)  # full turns within the trained length
        ramp = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divide by the factor, 1: keep
        return (1 - ramp) * plain / self.scaling["factor"] + ramp * plain


def is_positive(value: Any) -> bool:
    """Return whether a value is a number above 0 that float32 can hold, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= FLOAT


FAMILIES: dict[str, dict[str, Any]] = {  # values of keys that are missing in a config.json
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}
COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window", "max_window_layers", "no_rope_layer_interval"),
)


class ModelConfig(llama.LlamaConfig):
    """One decoder of any of the families."""

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json` of transformers 4 or 5.

        Raises:
            ConfigError: another `model_type`, a classifier, an activation other than silu, an unsupported quantization,
                missing or impossible numbers; the last three in one message.
        """
        family = source.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ConfigError(f"model_type {family!r:.80} is not supported; supported are {sorted(FAMILIES)}")
        architectures = source.get("architectures")
        if "Classification" in str(architectures):
            raise ConfigError(f"architectures {architectures!r:.80}: is a classifier; {in_recipe('classify_texts')}")
        values = COMMON | FAMILIES[family]
        values |= {k: v for k, v in _flat(source).items() if v is not None or k not in COMMON}
        _check(values)
        heads = values["num_attention_heads"]
        head_dim = values.get("head_dim") or values["hidden_size"] // heads
        layers = values["num_hidden_layers"]
        attention_bias = bool(values.get("attention_bias")) and family in ("llama", "qwen3", "smollm3")
        rotated = _rotated(values) if family == "smollm3" else (True,) * layers
        config = cls(
            source=dict(source),
            **{key: values[key] for key in ("model_type", *REQUIRED, "rms_norm_eps", "tie_word_embeddings")},
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=values["max_position_embeddings"],
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(values.get("mlp_bias")) and family in ("llama", "smollm3"),
            qk_norm=family == "qwen3",
            is_fused=family == "phi3",
            windows=_windows(values, rotated),
            rotated=rotated,
            rope=_rope(values, head_dim),
        )
        if heads % config.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_key_value_heads}"
            )
        if config.rope.width + config.rope.width % 2 > head_dim:
            raise ConfigError(f"head_dim {head_dim} is odd, but its coordinates turn in pairs")
        return config


def read_config_file(path: Path) -> ModelConfig:
    """Read a config.json by itself; an error of `ModelConfig.from_dict` names it."""
    try:
        return ModelConfig.from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def class_name(model_type: str) -> str:
    """Return the prefix of the names of transformers' classes for a family."""
    return "SmolLM3" if model_type == "smollm3" else model_type.capitalize()


def _flat(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in the form of transformers 4: `rope_parameters` become `rope_scaling` and `rope_theta`."""
    scaling = source.get("rope_scaling") or source.get("rope_parameters") or {}
    given = {}
    if isinstance(scaling, Mapping):
        given = {key: scaling[key] for key in ("rope_theta", "partial_rotary_factor") if scaling.get(key)}
    return {**source, "rope_scaling": scaling, **given}


def _check(values: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` that names every key with an impossible value."""
    bad = []
    for key in (*REQUIRED, *OPTIONAL):
        value = values.get(key)
        if value is None and key not in REQUIRED:
            continue
        least, most = 0 if key == "max_window_layers" else 1, SIZES.get(key, COUNT)  # 0: every layer has a window
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            bad.append(f"{key}: found {value!r:.80}, need a whole number from {least} to {most}")
    for key, highest in (("rms_norm_eps", FLOAT), ("rope_theta", FLOAT), ("partial_rotary_factor", 1.0)):
        if not is_positive(values[key]) or values[key] > highest:
            bad.append(f"{key}: found {values[key]!r:.80}, need a number above 0 and at most {highest:g}")
    for key, kind in (("rope_scaling", Mapping), ("layer_types", list), ("no_rope_layers", list)):
        if values.get(key) is not None and not isinstance(values[key], kind):
            bad.append(f"{key}: found {values[key]!r:.80}, need a JSON {'list' if kind is list else 'object'}")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if not isinstance(values.get(key) or False, bool):
            bad.append(f"{key}: found {values[key]!r:.80}, need true or false")
    if values["model_type"] != "phi3" and values["partial_rotary_factor"] != 1:
        bad.append(f"partial_rotary_factor: found {values['partial_rotary_factor']!r:.80}, which only phi3 knows")
    if values["model_type"] == "mistral" and values.get("layer_types") is not None:
        bad.append("layer_types: mistral has one window for all layers; a config with layer_types is ministral's")
    if values["hidden_act"] not in ("silu", "swish"):
        bad.append(f"hidden_act: found {values['hidden_act']!r:.80}, supported is 'silu'")
    if values.get("quantization_config") is not None and not is_four_bit(values):
        bad.append("quantization_config: of quantized checkpoints only bitsandbytes' 4-bit ones can be read")
    if bad:
        raise ConfigError("config.json cannot be used:\n  " + "\n  ".join(bad))


def _rotated(values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return which layers of SmolLM3 rotate q and k: all but every fourth, unless the config lists them."""
    layers, interval = values["num_hidden_layers"], values.get("no_rope_layer_interval") or 4
    listed = values.get("no_rope_layers")  # despite its name, 1 means "with rope"
    if listed is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if len(listed) < layers:
        raise ConfigError(f"no_rope_layers has {len(listed)} entries; the model has {layers} layers")
    return tuple(bool(entry) for entry in listed[:layers])


def _windows(values: Mapping[str, Any], rotated: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Return the window of each layer: the same in mistral and phi3, that of `layer_types` in qwen and smollm3."""
    family, layers, window = values["model_type"], values["num_hidden_layers"], values.get("sliding_window")
    if family in ("mistral", "phi3"):
        return (window,) * layers
    types = values.get("layer_types")
    is_listed = family == "smollm3" and types is not None  # then transformers ignores use_sliding_window
    if family == "llama" or not (values.get("use_sliding_window") or is_listed):
        return (None,) * layers
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
    elif family == "smollm3":
        slides = [not turn for turn in rotated]
    else:
        first = values.get("max_window_layers")
        slides = [i >= (28 if first is None else first) for i in range(layers)]
    if len(slides) != layers:
        raise ConfigError(f"layer_types has {len(slides)} entries; the model has {layers} layers")
    return tuple(window if slide else None for slide in slides)


def _rope(values: Mapping[str, Any], head_dim: int) -> ScaledRope:
    scaling = values["rope_scaling"]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "su" or (kind == "yarn" and values["model_type"] == "phi3"):
        kind = "longrope"  # Phi-3's first names for it
    return ScaledRope(
        width=int(head_dim * values["partial_rotary_factor"]),
        theta=float(values["rope_theta"]),
        kind=kind,
        scaling=dict(scaling),
        trained_length=values.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or values["max_position_embeddings"],
        max_length=values["max_position_embeddings"],
    )
