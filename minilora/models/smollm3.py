"""SmolLM3: a Llama in which every fourth layer does not rotate q and k  [NoPE: Yang et al. 2025, Rope to Nope].

`no_rope_layers` lists the layers, where 1 means, despite its name, that a layer rotates; without it
`no_rope_layer_interval` counts them. Windows are those of `layer_types` or, if `use_sliding_window` asks for them, of
the layers that do not rotate.
"""

from typing import Any

from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.llama import MLP, Attends, Attention, Block, CosSin, LlamaConfig
from minilora.models.family import Family, Values, some_windows


class UnrotatedAttention(Attention):
    """Attention without positions: a token sees which others come before it, and not how far."""

    def forward(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        q, k, v = self.heads(x)
        return self.o_proj(documents.attend(q, k, v, self.window).flatten(1))


def build_block(config: LlamaConfig, layer: int) -> nn.Module:
    attention = Attention if rotated_layers(config.source)[layer] else UnrotatedAttention
    return Block(config, attention(config, layer), MLP(config))


def rotated_layers(values: Values) -> list[bool]:
    """Return which layers rotate q and k."""
    layers, listed = values["num_hidden_layers"], values.get("no_rope_layers")
    if listed is None:
        interval = values.get("no_rope_layer_interval") or 4
        return [(i + 1) % interval != 0 for i in range(layers)]
    if len(listed) < layers:
        raise ConfigError(f"no_rope_layers has {len(listed)} entries; the model has {layers} layers")
    return [bool(entry) for entry in listed[:layers]]


def fields(values: Values) -> dict[str, Any]:
    slides = [bool(values.get("use_sliding_window")) and not rotated for rotated in rotated_layers(values)]
    return some_windows(values, slides)


DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True}
SMOLLM3 = Family("SmolLM3", DEFAULTS, fields, build_block, biases=("attention_bias", "mlp_bias"))
