"""OLMo 2: a Llama that normalizes the output of each branch of the residual stream, not its input.

    x ← x + rms_norm(attention(x)),  x ← x + rms_norm(mlp(x))        [OLMo Team 2024, 2 OLMo 2 Furious, §2]
    q ← rotate(rms_norm(q)),  k ← rotate(rms_norm(k))                before q and k are divided into heads

So `post_attention_layernorm` belongs to attention here; in a Llama it is the norm before the MLP.
"""

from __future__ import annotations

from torch import Tensor

from minilora.llama import MLP, Attends, Attention, Block, CosSin, LlamaConfig, RMSNorm
from minilora.models.family import Family


class Olmo2Attention(Attention):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.num_attention_heads * config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.num_key_value_heads * config.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor) -> list[Tensor]:
        rows = (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        return [part.unflatten(-1, (-1, self.head_dim)) for part in rows]


class Olmo2Block(Block):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, Olmo2Attention(config, layer), MLP(config))
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        return self.post_attention_layernorm(self.self_attn(x, rotation, documents))

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(self.mlp(x))


OLMO2 = Family(
    "Olmo2",
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    build_block=Olmo2Block,
    biases=("attention_bias",),
)
