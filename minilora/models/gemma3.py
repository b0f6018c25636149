"""Gemma 3, its text models: a Llama with other norms, another gate, and two rotations  [Gemma Team 2025, Gemma 3, §2].

    norm(x) = (1 + w) ∘ x/rms(x);  x = √D · embedding(token);  the gate is gelu, not silu
    x ← x + norm(attention(norm(x))),  x ← x + norm(mlp(norm(x)))
    q ← rotate(norm(q)) · √(E/c),  k ← rotate(norm(k))               c is query_pre_attn_scalar

Five layers have a window and θ = 10,000, the sixth sees everything with θ = 1,000,000. The weight of its norm has the
scale of q, and the first block multiplies the embedding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.llama import MLP, Attends, Block, Checkpointing, CosSin, Llama, LlamaConfig, RMSNorm, rms_norm
from minilora.models.family import Family, Values, some_windows
from minilora.models.qwen3 import Qwen3Attention
from minilora.models.rotary import build_rope_by_window


class GemmaNorm(RMSNorm):
    def __init__(self, size: int, config: LlamaConfig, scale: float = 1.0):
        super().__init__(size, config.rms_norm_eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))  # 1 + w has no room in 16 bits
        return rms_norm(x, self.scale * (1 + wide), self.eps).to(x.dtype)


class GemmaAttention(Qwen3Attention):  # which applies the norms of q and k
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        c = config.source.get("query_pre_attn_scalar") or 256
        self.q_norm = GemmaNorm(self.head_dim, config, math.sqrt(self.head_dim / c))
        self.k_norm = GemmaNorm(self.head_dim, config)


class GemmaMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaBlock(Block):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, GemmaAttention(config, layer), GemmaMLP(config))
        self.input_layernorm = GemmaNorm(config.hidden_size, config)
        self.post_attention_layernorm = GemmaNorm(config.hidden_size, config)
        self.pre_feedforward_layernorm = GemmaNorm(config.hidden_size, config)
        self.post_feedforward_layernorm = GemmaNorm(config.hidden_size, config)
        self.layer, self.kind = layer, int(config.windows[layer] is None)

    def forward(self, x: Tensor, rotation: CosSin, documents: Attends, checkpointing: Checkpointing) -> Tensor:
        if self.layer == 0:
            x = x * x.new_full((), math.sqrt(x.size(-1)))  # √D in the dtype of x
        cos, sin = rotation
        return super().forward(x, (cos[self.kind], sin[self.kind]), documents, checkpointing)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        return self.post_attention_layernorm(super().attention_branch(x, rotation, documents))

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def adjust_(model: Llama) -> None:
    model.model.norm = GemmaNorm(model.config.hidden_size, model.config)


def fields(values: Values) -> dict[str, Any]:
    every = values.get("sliding_window_pattern") or 6
    windows = some_windows(values, [(i + 1) % every != 0 for i in range(values["num_hidden_layers"])])
    return {**windows, "rope": build_rope_by_window(values, values["head_dim"])}


SIZES = {"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
DEFAULTS = {**SIZES, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
GEMMA3 = Family("Gemma3", DEFAULTS, fields, GemmaBlock, adjust_, biases=("attention_bias",))
