"""Qwen3.5, its text models: most blocks have a gated delta rule in place of attention  [Qwen Team 2026, Qwen3.5].

    x ← x + mixer(norm(x)),  x ← x + mlp(norm(x)),  norm(x) = (1 + w) ∘ x/rms(x)
    attention(y) = W_o (o ∘ σ(g)),  [q g] = W_q y of each head;  q, k = rotate(norm(q)), rotate(norm(k))

The last of four layers, or those that `layer_types` names, attend; the others are in delta_rule.py. A quarter of each
head rotates. Where the pairs of a head are divided among the axes of an image (`mrope_section`), text has one position
for all of them.
"""

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.llama import MLP, Attends, Attention, Block, CosSin, LlamaConfig, rotate
from minilora.models.delta_rule import GatedDeltaNet, linear_sizes
from minilora.models.family import Family, Values, layers_of_kind
from minilora.models.gemma3 import GemmaNorm, adjust_
from minilora.models.rotary import build_rope


class GatedAttention(Attention):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.q_proj = nn.Linear(config.hidden_size, 2 * self.q_proj.out_features, config.qkv_bias)
        self.q_norm = GemmaNorm(self.head_dim, config)
        self.k_norm = GemmaNorm(self.head_dim, config)

    def forward(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        q, k, v = self.heads(x)
        q, gate = q.unflatten(1, (-1, 2)).unbind(2)
        q = rotate(self.q_norm(q), *rotation).to(v.dtype)
        k = rotate(self.k_norm(k), *rotation).to(v.dtype)
        o = documents.attend(q, k, v, self.window)
        return self.o_proj((o * gate.sigmoid()).flatten(1))


class Qwen35Block(Block):
    def __init__(self, config: LlamaConfig, mixer: nn.Module):
        super().__init__(config, mixer, MLP(config))
        self.input_layernorm = GemmaNorm(config.hidden_size, config)
        self.post_attention_layernorm = GemmaNorm(config.hidden_size, config)


class LinearBlock(Qwen35Block):
    self_attn: Any = property(attrgetter("linear_attn"))

    def __init__(self, config: LlamaConfig, mixer: nn.Module):
        super().__init__(config, mixer)
        self.linear_attn = self._modules.pop("self_attn")


def build_block(config: LlamaConfig, layer: int) -> nn.Module:
    if is_linear(config.source)[layer]:
        return LinearBlock(config, GatedDeltaNet(config))
    return Qwen35Block(config, GatedAttention(config, layer))


def is_linear(values: Values) -> list[bool]:
    """Return which layers have a delta rule in place of attention."""
    every = values.get("full_attention_interval") or 4
    others = [(i + 1) % every != 0 for i in range(values["num_hidden_layers"])]
    return layers_of_kind(values, "linear_attention", others)


def fields(values: Values) -> dict[str, Any]:
    K, H, *_ = linear_sizes(values)
    if H % K:
        raise ConfigError(f"linear_num_value_heads {H} is not a multiple of linear_num_key_heads {K}")
    is_linear(values)  # or an error
    return {"rope": build_rope(values, int(values["head_dim"] * values["partial_rotary_factor"]))}


SIZES = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 256, "partial_rotary_factor": 0.25}
QWEN35 = Family("Qwen3_5", SIZES, fields, build_block, adjust_, biases=("attention_bias",))
