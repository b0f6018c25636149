"""What a family of models is, beside the Llama of `minilora.llama`: a reader of its config.json, and its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.errors import ConfigError
from minilora.llama import Checkpointing, CosSin, Llama, LlamaConfig

Values = Mapping[str, Any]  # of a config.json, with the family's defaults for missing keys


@dataclass(frozen=True)
class Family:
    """A family of models, by the `model_type` of their config.json.

    Args:
        name: the prefix of the names of transformers' classes.
        defaults: the values that transformers gives to missing keys.
        fields: (values) -> the fields of a `LlamaConfig` that are not copied from config.json, by name.
        build_model: builds the model; in the family's own file if its structure differs from Llama's.
        names: keys that only this family's config.json has, with the usual names of what they say.
    """

    name: str
    defaults: Values
    fields: Callable[[Values], dict[str, Any]]
    build_model: Callable[[LlamaConfig], Llama] = Llama
    names: Mapping[str, str] = field(default_factory=dict)


class ResidualBlock(nn.Module, ABC):
    """A block of two branches that a family defines: x ← x + attention_branch(x), x ← x + mlp_branch(x) (abstract)."""

    def forward(self, x: Tensor, rotation: CosSin, documents: Any, checkpointing: Checkpointing) -> Tensor:
        x = x + self.attention_branch(x, rotation, documents)
        if checkpointing == "mlp":
            return x + checkpoint(self.mlp_branch, x, use_reentrant=False)
        return x + self.mlp_branch(x)

    @abstractmethod
    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Any) -> Tensor:
        """Return what attention adds to x: (N, D) -> (N, D)."""

    @abstractmethod
    def mlp_branch(self, x: Tensor) -> Tensor:
        """Return what the MLP adds to x: (N, D) -> (N, D)."""


def attention_biases(values: Values) -> dict[str, Any]:
    """Return the fields for `attention_bias`: q, k, v and o have biases, or none of them has."""
    has_bias = bool(values.get("attention_bias"))
    return {"qkv_bias": has_bias, "o_bias": has_bias}


def all_biases(values: Values) -> dict[str, Any]:
    """Return the fields for `attention_bias` and `mlp_bias`."""
    return {"mlp_bias": bool(values.get("mlp_bias")), **attention_biases(values)}


def equal_windows(values: Values) -> dict[str, Any]:
    """Return the field for a window that is the same in every layer."""
    if values.get("layer_types") is not None:
        raise ConfigError("layer_types: the family has one window for all layers")
    return {"windows": (values.get("sliding_window"),) * values["num_hidden_layers"]}


def some_windows(values: Values, slides: Sequence[bool], kind: str = "sliding_attention") -> dict[str, Any]:
    """Return the field for a window in some layers: those of a kind in `layer_types` or, without it, of `slides`."""
    if (types := values.get("layer_types")) is not None:
        slides = [each == kind for each in types]
    if len(slides) != values["num_hidden_layers"]:
        raise ConfigError(f"layer_types has {len(slides)} entries; the model has {values['num_hidden_layers']} layers")
    return {"windows": tuple(values.get("sliding_window") if slide else None for slide in slides)}
