"""What a family of models is: how its config.json is read, and its model built, if it is not a `minilora.llama`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import ConfigError
from minilora.llama import Llama, LlamaConfig

Values = Mapping[str, Any]  # of a config.json, with the family's defaults for missing keys


@dataclass(frozen=True)
class Family:
    """A family of models, by the `model_type` of their config.json.

    Args:
        name: the prefix of the names of transformers' classes.
        defaults: the values that transformers gives to missing keys.
        fields: (values) -> the fields of a `LlamaConfig` that the family computes in its own way, by name.
        build_model: builds the model; in the family's own file if its structure differs from Llama's.
        names: keys that only this family's config.json has, and the usual keys of the same meaning.
        biases: which of the keys `attention_bias` (of q, k, v and o) and `mlp_bias` are read.
    """

    name: str
    defaults: Values
    fields: Callable[[Values], dict[str, Any]] = lambda values: {}
    build_model: Callable[[LlamaConfig], Llama] = Llama
    names: Mapping[str, str] = field(default_factory=dict)
    biases: Sequence[str] = ()


def equal_windows(values: Values) -> dict[str, Any]:
    """Return the field for a window that is the same in every layer."""
    if values.get("layer_types") is not None:
        raise ConfigError("layer_types: the family has one window for all layers")
    return {"windows": (values.get("sliding_window"),) * values["num_hidden_layers"]}


def some_windows(values: Values, slides: Sequence[bool]) -> dict[str, Any]:
    """Return the field for a window in some layers: those that `layer_types` names or, without it, of `slides`."""
    slides = layers_of_kind(values, "sliding_attention", slides)
    return {"windows": tuple(values.get("sliding_window") if slide else None for slide in slides)}


def layers_of_kind(values: Values, kind: str, default: Sequence[bool]) -> list[bool]:
    """Return whether each layer is of a kind, by `layer_types` or, without it, by the default."""
    types, layers = values.get("layer_types"), values["num_hidden_layers"]
    if types is None:
        return list(default)
    if len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries; the model has {layers} layers")
    return [layer_type == kind for layer_type in types]
