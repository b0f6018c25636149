"""Qwen3: a Llama whose heads have an RMSNorm of q and one of k, with weights for one head, before the rotation.

    q_h ← rotate(rms_norm(q_h)),  k_h ← rotate(rms_norm(k_h))        [Qwen3 Technical Report 2025, §2]

`head_dim` is a number of its own. As in Qwen2, the layers from `max_window_layers` on, or those that `layer_types`
names, have a window if `use_sliding_window` says so; here biases are read from `attention_bias`.
"""

from typing import Any

from torch import Tensor, nn

from minilora.llama import MLP, Attention, Block, LlamaConfig, RMSNorm
from minilora.models.family import Family, Values, some_windows


class Qwen3Attention(Attention):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [self.q_norm(q), self.k_norm(k), v]


def build_block(config: LlamaConfig, layer: int) -> nn.Module:
    return Block(config, Qwen3Attention(config, layer), MLP(config))


def windows(values: Values) -> dict[str, Any]:
    """Return the field `windows` of Qwen2 and Qwen3."""
    if not values.get("use_sliding_window"):
        return {}
    first = values.get("max_window_layers")
    return some_windows(values, [i >= (28 if first is None else first) for i in range(values["num_hidden_layers"])])


DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
QWEN2 = Family("Qwen2", DEFAULTS, lambda values: {"qkv_bias": True, **windows(values)})
QWEN3 = Family("Qwen3", {**DEFAULTS, "head_dim": 128}, windows, build_block, biases=("attention_bias",))
