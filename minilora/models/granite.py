"""Granite: a Llama with four multipliers, by which one learning rate fits every width  [Yang et al. 2022, µTransfer].

    x = e · embedding(token)                                        embedding_multiplier
    softmax(a · q kᵀ) v  in place of  softmax(q kᵀ/√E) v            attention_multiplier
    x ← x + r · attention(norm(x)),  x ← x + r · mlp(norm(x))       residual_multiplier
    logits = head(norm(x)) / s                                      logits_scaling

The decoder and its kernels know none of them: the first block multiplies the embedding, a · √E is a factor of q, and
the last norm divides by s, since the head is linear; so the loss and generation see the same logits.
"""

import math

from torch import Tensor

from minilora.llama import MLP, Attends, Attention, Block, Checkpointing, CosSin, Llama, LlamaConfig, RMSNorm
from minilora.models.family import Family


class GraniteAttention(Attention):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.query_scale = multiplier(config, "attention_multiplier") * math.sqrt(config.head_dim)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [self.query_scale * q, k, v]


class GraniteBlock(Block):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, GraniteAttention(config, layer), MLP(config))
        self.residual_multiplier = multiplier(config, "residual_multiplier")
        self.input_scale = multiplier(config, "embedding_multiplier") if layer == 0 else 1.0

    def forward(self, x: Tensor, rotation: CosSin, documents: Attends, checkpointing: Checkpointing) -> Tensor:
        x = x if self.input_scale == 1 else self.input_scale * x
        return super().forward(x, rotation, documents, checkpointing)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        return self.residual_multiplier * super().attention_branch(x, rotation, documents)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.residual_multiplier * super().mlp_branch(x)


class DividedNorm(RMSNorm):
    def __init__(self, config: LlamaConfig):
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.divisor = multiplier(config, "logits_scaling")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.divisor


def multiplier(config: LlamaConfig, name: str) -> float:
    return config.source.get(name) or 1.0


def adjust_(model: Llama) -> None:
    model.model.norm = DividedNorm(model.config)


MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
GRANITE = Family(
    "Granite",
    {"max_position_embeddings": 2048},
    build_block=GraniteBlock,
    adjust_=adjust_,
    biases=("attention_bias", "mlp_bias"),
)
