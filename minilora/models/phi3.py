"""Phi-3: a Llama in which q, k and v are one matrix, and so are gate and up.

A part of each head may be rotated (`partial_rotary_factor`), and every layer has the same window. In its first configs
LongRoPE was called "su" or "yarn".
"""

from typing import Any

from torch import Tensor, nn

from minilora.llama import Attends, Block, CosSin, LlamaConfig, rotate, swiglu
from minilora.models.family import Family, Values, equal_windows
from minilora.models.rotary import build_rope


class Phi3Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = E, config.windows[layer]
        self.widths = [H * E, K * E, K * E]
        self.qkv_proj = nn.Linear(D, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(H * E, D, bias=False)

    def forward(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x).split(self.widths, dim=-1))
        q, k = rotate(q, *rotation).to(v.dtype), rotate(k, *rotation).to(v.dtype)
        return self.o_proj(documents.attend(q, k, v, self.window).flatten(1))


class Phi3MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up))


def build_block(config: LlamaConfig, layer: int) -> nn.Module:
    return Block(config, Phi3Attention(config, layer), Phi3MLP(config))


def fields(values: Values) -> dict[str, Any]:
    scaling = values["rope_scaling"]
    if (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):
        scaling = {**scaling, "rope_type": "longrope"}
    width = int(values["head_dim"] * values["partial_rotary_factor"])
    return {**equal_windows(values), "rope": build_rope({**values, "rope_scaling": scaling}, width)}


PHI3 = Family(
    "Phi3",
    {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    fields,
    build_block,
)
