"""What a family of models is: how its config.json is read, and what its model has that a Llama does not have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.errors import ConfigError
from minilora.llama import BuildBlock, Llama, llama_block

Values = Mapping[str, Any]  # of a config.json, with the family's defaults for missing keys


@dataclass(frozen=True)
class Family:
    """A family of models, by the `model_type` of their config.json."""

    name: str  # the prefix of the names of transformers' classes
    defaults: Values  # those that transformers gives to missing keys
    fields: Callable[[Values], dict[str, Any]] = lambda values: {}  # of a `LlamaConfig`, computed in the family's way
    build_block: BuildBlock = llama_block  # (config, index of the layer) -> a block of the decoder
    adjust_: Callable[[Llama], None] = lambda model: None  # changes in a new model what is outside the blocks
    biases: Sequence[str] = ()  # which of the keys `attention_bias` (of q, k, v and o) and `mlp_bias` are read


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
