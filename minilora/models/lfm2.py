"""LFM2: most blocks have a short convolution in place of attention  [Liquid AI 2025, LFM2 Technical Report, §2].

Attention norms q and k, as in Qwen3. Properties give modules the names of the page.
"""

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from minilora.llama import Attends, Attention, Block, CosSin, Decoder, Llama, LlamaConfig, RMSNorm, swiglu
from minilora.models.convolution import ShortConvolution, convolves
from minilora.models.family import Family, Values


class Lfm2Attention(Attention):
    o_proj: Any = property(attrgetter("out_proj"))

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.out_proj = self._modules.pop("o_proj")
        self.q_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [self.q_layernorm(q), self.k_layernorm(k), v]


class Lfm2MLP(nn.Module):
    def __init__(self, D: int, width: int):
        super().__init__()
        self.w1 = nn.Linear(D, width, bias=False)
        self.w3 = nn.Linear(D, width, bias=False)
        self.w2 = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Lfm2Block(Block):
    def __init__(self, config: LlamaConfig, layer: int):
        nn.Module.__init__(self)  # parts and norms have other names than a Llama's
        if convolves(config.source)[layer]:
            self.conv = ShortConvolution(config)
        else:
            self.self_attn = Lfm2Attention(config, layer)
        self.feed_forward = Lfm2MLP(config.hidden_size, config.intermediate_size)
        self.operator_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        mixer = self.conv if "conv" in self._modules else self.self_attn
        return mixer(self.operator_norm(x), rotation, documents)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.ffn_norm(x))


class Lfm2Decoder(Decoder):
    norm: Any = property(attrgetter("embedding_norm"))


def adjust_(model: Llama) -> None:
    model.model = Lfm2Decoder(model.config, Lfm2Block)
    model.model.register_module("embedding_norm", model.model._modules.pop("norm"))
    model.tie_weights()


def fields(values: Values) -> dict[str, Any]:
    width, multiple = values["intermediate_size"], values.get("block_multiple_of") or 256
    if values.get("block_auto_adjust_ff_dim", True):
        width = int((values.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
        width = -(-width // multiple) * multiple
    convolves(values)  # or an error
    return {"intermediate_size": width}


SIZES = {"max_position_embeddings": 128_000, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "conv_L_cache": 3}
NAMES = {"norm_eps": "rms_norm_eps", "block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
DEFAULTS = {**SIZES, "rope_theta": 1e6, "tie_word_embeddings": True}
LFM2 = Family("Lfm2", DEFAULTS, fields, Lfm2Block, adjust_, NAMES)
